"""The state of a run in one file: a safetensors container whose header holds the JSON part.

One file, renamed into place, cannot be half-written. Its ending keeps it out of lists of LoRAs.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..files import read_header, write_safetensors

STATE_SUFFIX = ".state"
FORMAT = "braid training state 2"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nested state (dicts, lists, tensors, JSON scalars) to one file, or nothing.

    A tensor that stands in several places, as the code books of 8-bit optimizers, is written once.
    ValueError for anything else in it: it could only be saved by pickling.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_flatten(state, "", tensors, {}))
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    checksum = _checksum(skeleton, tensors)
    write_safetensors(path, tensors, {"format": FORMAT, "state": skeleton, "crc32": checksum})


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote; ValueError when the file is damaged or something else."""
    try:
        metadata = read_header(path).metadata
    except ValueError:  # which may quote the file, and it may be anybody's
        raise ValueError(f"{path}: not a training state of Braid, or cut short") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a training state of this version of Braid ({FORMAT})")
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if _checksum(metadata["state"], tensors) != metadata["crc32"]:
            raise ValueError("its checksum does not fit its contents")
        return _rebuild(json.loads(metadata["state"]), tensors)
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path}: the training state is damaged ({error}); resume from an earlier one"
        ) from error


def _checksum(skeleton: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of everything in the file; a bit that flips on a disk changes it."""
    checksum = zlib.crc32(skeleton.encode())
    for key in sorted(tensors):
        flat = tensors[key].reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(flat.numpy(), zlib.crc32(key.encode(), checksum))
    return f"{checksum:08x}"


def _flatten(value: Any, key: str, tensors: dict[str, Tensor], keys: dict[int, str]) -> Any:
    """The JSON part of `value`. Its tensors go into `tensors`, under `keys` by their identity."""
    if type(value) in (Tensor, torch.nn.Parameter):  # a subclass holds what a file cannot
        first = keys.setdefault(id(value), key)
        tensors[first] = value
        return {"tensor": first}
    if isinstance(value, Mapping):
        items = [[k, _flatten(v, f"{key}/{k}", tensors, keys)] for k, v in value.items()]
        return {"items": items}
    if isinstance(value, (list, tuple)):
        items = [_flatten(v, f"{key}/{i}", tensors, keys) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"the training state cannot be saved: {key.strip('/')} is a {type(value).__name__}; turn "
        "save_state off, or choose an optimizer whose state is tensors and numbers"
    )


def _rebuild(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "items" in value:
        return {k: _rebuild(v, tensors) for k, v in value["items"]}
    if "tuple" in value:
        return tuple(_rebuild(v, tensors) for v in value["tuple"])
    return [_rebuild(v, tensors) for v in value["list"]]
