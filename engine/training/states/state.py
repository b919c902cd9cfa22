"""The state of a run in one file: a safetensors container whose header holds the JSON part.

One file, renamed into place, cannot be half-written. Its ending keeps it out of lists of LoRAs.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...disk.reading import DamagedFileError, parse_json, shown
from ...files import mapped_tensors, read_header, write_safetensors

STATE_SUFFIX = ".state"
FORMAT = "braid training state 2"
DEEPEST = 120
"""Brackets in each other in the JSON part, three for each level of a state; a run's has eight."""


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
    """What `write_state` wrote; DamagedFileError when the file is damaged or something else."""
    metadata = read_header(path).metadata
    if metadata.get("format") != FORMAT:
        raise DamagedFileError(
            path, f"not a training state of this version of Braid ({FORMAT}); choose another file"
        )
    tensors = mapped_tensors(path)
    skeleton = metadata.get("state", "")
    try:
        if _checksum(skeleton, tensors) != metadata.get("crc32"):
            raise ValueError("its checksum does not fit its contents")
        state = _rebuild(parse_json(skeleton, DEEPEST), tensors)
        if not isinstance(state, dict):
            raise ValueError("it is not one mapping")
    except ValueError as error:
        raise DamagedFileError(
            path, f"the training state is damaged ({error}); resume from an earlier one"
        ) from error
    return state


def _checksum(skeleton: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of everything in the file; a bit that flips on a disk changes it."""
    checksum = zlib.crc32(skeleton.encode())
    for key in sorted(tensors):
        flat = tensors[key].reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(flat.numpy().data, zlib.crc32(key.encode(), checksum))
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
    """The state that `_flatten` made `value` of; ValueError for anything that it never makes."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case {"tensor": str(key), **others} if key in tensors and not others:
            return tensors[key]
        case {"items": [*items], **others} if not others and all(map(_is_item, items)):
            return {key: _rebuild(part, tensors) for key, part in items}
        case {"tuple": [*parts], **others} if not others:
            return tuple(_rebuild(part, tensors) for part in parts)
        case {"list": [*parts], **others} if not others:
            return [_rebuild(part, tensors) for part in parts]
    raise ValueError(f"its structure holds {shown(value)}")


def _is_item(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and not isinstance(item[0], (list, dict))
