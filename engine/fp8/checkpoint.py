"""The FP8 files that exist, read into one form and written as ComfyUI's.

The one form, per layer: `<layer>.weight` the codes, `<layer>.weight_scale` float32 (multiply to
dequantise; 0-d, [out, 1] or [out, blocks, 1]) and `<layer>.comfy_quant` the JSON
{"format": "float8_e4m3fn"} as bytes (ComfyUI's QUANTIZATION.md). ComfyUI itself reads only 0-d
scales right; a file with finer ones names a format of ours, which ComfyUI refuses by that name.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import replaced_when_whole
from .source import DTYPES

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BRAID = "braid_"
QUANTIZATION_METADATA = "_quantization_metadata"
LEGACY_MARKER = "scaled_fp8"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PLAIN_NOTE = "a plain FP8 cast without scales: loaded as it is, it cannot be made better"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Checkpoint:
    """A file that was FP8 already, in the one form."""

    origin: str
    """Who wrote it, in words."""
    tensors: dict[str, Tensor]
    scaled: tuple[str, ...]
    """Layers with codes and a scale; empty when core alone knows the format."""


def core_format(dtype: torch.dtype) -> str:
    """ComfyUI's name of per-tensor scaled FP8."""
    return {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}[dtype]


def format_name(dtype: torch.dtype, scale: Tensor) -> str:
    """The format that a saved file names for this scale: core's, or ours where core has none."""
    if scale.numel() == 1:
        return core_format(dtype)
    granularity = "block" if scale.ndim == 3 else "channel"
    return f"{BRAID}{core_format(dtype)}_{granularity}"


def comfy_quant(format_: str) -> Tensor:
    """The marker tensor of one layer."""
    return torch.tensor(list(json.dumps({"format": format_}).encode()), dtype=torch.uint8)


def recognise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Fp8Checkpoint | None:
    """The file in the one form; None when it is not quantised; ValueError when it is unreadable."""
    formats = _formats(tensors, metadata)
    codes = {
        key.removesuffix(".weight"): tensor
        for key, tensor in tensors.items()
        if key.endswith(".weight") and tensor.dtype in FP8
    }
    if foreign := {f for f in formats.values() if f not in _READABLE}:
        return _foreign(tensors, foreign)
    scales = {layer: scale for layer in codes if (scale := _scale_of(tensors, layer)) is not None}
    if not codes and not formats:
        return None
    if not scales:
        return Fp8Checkpoint(origin=PLAIN_NOTE, tensors=dict(tensors), scaled=())
    if without := sorted(set(codes) - set(scales)):
        raise ValueError(
            f"{len(without)} FP8 layers have no scale ({without[0]}, …) while {len(scales)} have "
            "one: the file is damaged or mixes two ways of quantising; make it again from bf16"
        )
    for layer, scale in scales.items():
        _check_shape(layer, codes[layer], scale)
    return Fp8Checkpoint(
        origin=_origin(tensors, formats, scales),
        tensors=_one_form(tensors, codes, scales),
        scaled=tuple(scales),
    )


_READABLE = {core_format(dtype) for dtype in FP8} | {
    f"{BRAID}{core_format(dtype)}_{granularity}"
    for dtype in FP8
    for granularity in ("channel", "block")
}


def _formats(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """layer -> format, from the marker tensors or the header."""
    formats = {}
    if QUANTIZATION_METADATA in metadata:
        for layer, entry in json.loads(metadata[QUANTIZATION_METADATA])["layers"].items():
            formats[layer] = entry["format"]
    for key, tensor in tensors.items():
        if key.endswith(".comfy_quant"):
            entry = json.loads(bytes(tensor.tolist()))
            formats[key.removesuffix(".comfy_quant")] = entry["format"]
    return formats


def _foreign(tensors: Mapping[str, Tensor], formats: set[str]) -> Fp8Checkpoint:
    if unknown := sorted(f for f in formats if f.startswith(BRAID)):
        raise ValueError(f"written by a newer Braid ({', '.join(unknown)}): update Braid")
    return Fp8Checkpoint(
        origin=f"already quantised ({', '.join(sorted(formats))}): left to ComfyUI as it is",
        tensors=dict(tensors),
        scaled=(),
    )


def _scale_of(tensors: Mapping[str, Tensor], layer: str) -> Tensor | None:
    for suffix in ("weight_scale", "scale_weight"):
        if (scale := tensors.get(f"{layer}.{suffix}")) is not None:
            return scale
    return None


def _check_shape(layer: str, codes: Tensor, scale: Tensor) -> None:
    out, width = codes.shape[0], codes.shape[-1]
    per_block = scale.ndim == 3 and scale.shape[0] == out and width % scale.shape[1] == 0
    if not (scale.numel() == 1 or tuple(scale.shape) in ((out,), (out, 1)) or per_block):
        raise ValueError(
            f"{layer}: a scale of shape {list(scale.shape)} on a weight of {list(codes.shape)} is "
            "neither per tensor, per channel [out, 1] nor per block [out, blocks, 1]; "
            "quantise the bf16 file instead"
        )


def _origin(
    tensors: Mapping[str, Tensor], formats: Mapping[str, str], scales: Mapping[str, Tensor]
) -> str:
    if any(f.startswith(BRAID) for f in formats.values()):
        return "saved by Braid"
    if formats or LEGACY_MARKER in tensors:
        return "ComfyUI's scaled FP8"
    fine = any(scale.numel() > 1 for scale in scales.values())
    return f"musubi-tuner's {'block- or channel-wise' if fine else 'per-tensor'} FP8"


def _one_form(
    tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    form = {
        key: tensor
        for key, tensor in tensors.items()
        if key != LEGACY_MARKER
        and not key.endswith((".scale_weight", ".weight_scale", ".comfy_quant", ".scale_input"))
    }
    for key, tensor in tensors.items():
        if key.endswith(".scale_input") and tensor.item() != 1.0:
            form[key.removesuffix("scale_input") + "input_scale"] = tensor
    for layer, scale in scales.items():
        out = codes[layer].shape[0]
        shape = () if scale.numel() == 1 else (out, 1) if scale.ndim < 3 else tuple(scale.shape)
        form[f"{layer}.weight_scale"] = scale.to(torch.float32).reshape(shape)
        form[f"{layer}.comfy_quant"] = comfy_quant(core_format(codes[layer].dtype))
    return form


def write_streamed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file one tensor at a time; whole or not at all.

    safetensors' own writer first copies every tensor, which would double the memory of a model.
    """
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in ordered:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replaced_when_whole(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            flat = tensors[name].detach().cpu().contiguous().view(-1)
            if flat.numel():
                file.write(memoryview(flat.view(torch.uint8).numpy()))
