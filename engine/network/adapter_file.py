"""Adapter files: a network's weights out and in, with metadata, checked after writing."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..disk.hashes import sshs_hashes
from ..disk.reading import damage_named
from ..disk.writing import NotWrittenError
from ..files import mapped_tensors, write_safetensors
from .adapters import Adapter
from .architectures import Architecture
from .attach import Network
from .keys import KeyFormat, comfyui_key, decoded, encoded
from .layers import LayerShape
from .weights import AdapterWeights

SAVE_PRECISIONS: dict[str, torch.dtype | None] = {
    "keep": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""save_precision → dtype; None keeps each tensor's own."""


def weights_of(network: Network) -> dict[str, AdapterWeights]:
    """The present weights as files hold them, detached but not copied, in the model's order."""
    return {
        name: AdapterWeights(
            kind=network.spec.kind,
            tensors=adapter.filed(_detached(adapter)),
            alpha=adapter.filed_alpha,
        )
        for name, adapter in network.items()
    }


def live_tensors(network: Network) -> dict[str, Tensor]:
    """The trained tensors themselves, under ComfyUI's keys, for what follows them as they change.

    What is gathered from them, in place of the tensors, `as_filed` puts into the form of a file.
    """
    return {
        comfyui_key(name, adapter, parameter): tensor
        for name, adapter in network.items()
        for parameter, tensor in _detached(adapter).items()
    }


def as_filed(network: Network, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`live_tensors`, or averages under their keys, as an adapter file holds them."""
    filed: dict[str, Tensor] = {}
    for name, adapter in network.items():
        keys = {p: comfyui_key(name, adapter, p) for p, _ in adapter.named_parameters()}
        held = adapter.filed({parameter: tensors[key] for parameter, key in keys.items()})
        filed |= {keys[parameter]: tensor for parameter, tensor in held.items()}
    return filed


def state_dict_of(
    network: Network,
    architecture: Architecture,
    key_format: KeyFormat = "comfyui",
) -> dict[str, Tensor]:
    """The network as the tensors of an adapter file; in ComfyUI's format it is a LORA_MODEL.

    Tensors are copies, so that training may go on.
    """
    state = encoded(weights_of(network), key_format, architecture)
    return {key: tensor.clone() for key, tensor in state.items()}


def read_adapter(
    source: Path | Mapping[str, Tensor],
    layers: Mapping[str, LayerShape],
    architecture: Architecture,
) -> dict[str, AdapterWeights]:
    """Dotted layer name → weights of a file or state dict in any key format (`keys.decoded`).

    DamagedFileError when the file is no adapter of such a model.
    """
    if not isinstance(source, Path):
        return decoded(source, layers, architecture)
    with damage_named(source):
        return decoded(mapped_tensors(source), layers, architecture)


def load_weights(network: Network, weights: Mapping[str, AdapterWeights]) -> None:
    """Copy `weights` into the network in place; ValueError when they are of another shape."""
    for name, adapter in network.items():
        layer = weights.get(name)
        own = {key: tensor.shape for key, tensor in adapter.filed(_detached(adapter)).items()}
        given = {} if layer is None else {key: t.shape for key, t in layer.tensors.items()}
        if layer is None or own != given:
            raise ValueError(
                f"the weights do not fit the network: {name} needs {_shapes(own)}, "
                f"the file has {_shapes(given) or 'nothing'}"
            )
        try:
            adapter.take(layer.tensors, layer.alpha)
        except ValueError as error:
            raise ValueError(f"the weights do not fit the network at {name}: {error}") from error


def cast(
    state: Mapping[str, Tensor], key_format: KeyFormat, save_precision: str
) -> dict[str, Tensor]:
    """`state` in the number format `save_precision`; alphas stay exact but in kohya's format."""
    dtype = SAVE_PRECISIONS[save_precision]
    return {
        key: tensor
        if dtype is None or (key.endswith(".alpha") and key_format != "kohya")
        else tensor.to(dtype)
        for key, tensor in state.items()
    }


def write_adapter(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata with the sshs hashes, then read the file back and compare.

    Whole or not at all; NotWrittenError too when the file does not hold what was to be written.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    complete = dict(metadata) | sshs_hashes(tensors, metadata)
    write_safetensors(path, tensors, complete, lambda file: verify_adapter(file, tensors, complete))


def verify_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """NotWrittenError unless the file holds exactly these tensors, bit for bit, and metadata."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if (file.metadata() or {}) != dict(metadata) or set(file.keys()) != set(tensors):
                raise _damaged(path, "read back with other keys or metadata than were written")
            for key, tensor in tensors.items():
                if not _same_bits(file.get_tensor(key), tensor):
                    raise _damaged(path, f"{key} read back different")
    except safetensors.SafetensorError as error:
        raise _damaged(path, f"could not be read back ({error})") from error


def _detached(adapter: Adapter) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in adapter.named_parameters()}


def _damaged(path: Path, what: str) -> NotWrittenError:
    return NotWrittenError(f"{path}: {what}; the disk is failing, save elsewhere")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key} {tuple(size)}" for key, size in shapes.items())
