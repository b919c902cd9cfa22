"""The FP8 files that exist, read into one form and written as ComfyUI's.

The one form, per layer: `<layer>.weight` the codes, `<layer>.weight_scale` float32 (multiply to
dequantise; 0-d, [out, 1] or [out, blocks, 1]) and `<layer>.comfy_quant` the JSON
{"format": "float8_e4m3fn"} as bytes (ComfyUI's QUANTIZATION.md). ComfyUI itself reads only 0-d
scales right; a file with finer ones names a format of ours, which ComfyUI refuses by that name.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..disk.reading import AGAIN, parse_json, shown
from .source import TensorSource

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BRAID = "braid_"
QUANTIZATION_METADATA = "_quantization_metadata"
LEGACY_MARKER = "scaled_fp8"
FULL_PRECISION = "full_precision_matrix_mult"
"""Of a layer: dequantise it before it is multiplied, whatever the card can do."""
Marker = Mapping[str, Any]
"""What a file says of one layer: `format`, and settings of it."""
MARKER = ".comfy_quant"
"""How the name of a layer's marker tensor ends."""
LONGEST_MARKER, LONGEST_FORMAT, DEEPEST = 1 << 16, 100, 16
"""Bytes of a marker, letters of the format it names, brackets in each other in its JSON."""
PLAIN_NOTE = "a plain FP8 cast without scales: loaded as it is, it cannot be made better"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8File:
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


def comfy_quant(format: str, **settings: object) -> Tensor:
    """The marker tensor of one layer."""
    marker = {"format": format, **settings}
    return torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)


def recognise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Fp8File | None:
    """The file in the one form; None when it is not quantised; ValueError when it is unreadable."""
    markers = _markers(tensors, metadata)
    codes = {
        key.removesuffix(".weight"): tensor
        for key, tensor in tensors.items()
        if key.endswith(".weight") and tensor.dtype in FP8
    }
    if foreign := {m["format"] for m in markers.values() if not _readable(m)}:
        return _foreign(tensors, foreign)
    scales = {layer: scale for layer in codes if (scale := _scale_of(tensors, layer)) is not None}
    if not codes and not markers:
        return None
    if not scales:
        return Fp8File(origin=PLAIN_NOTE, tensors=dict(tensors), scaled=())
    if without := sorted(set(codes) - set(scales)):
        raise ValueError(
            f"{len(without)} FP8 layers have no scale ({without[0]}, …) while {len(scales)} have "
            "one: the file is damaged or mixes two ways of quantising; make it again from bf16"
        )
    for layer, scale in scales.items():
        _check_shape(layer, codes[layer], scale)
    return Fp8File(
        origin=_origin(tensors, markers, scales),
        tensors=_one_form(tensors, codes, scales, markers),
        scaled=tuple(scales),
    )


_FORMATS = {core_format(dtype) for dtype in FP8} | {
    f"{BRAID}{core_format(dtype)}_{granularity}"
    for dtype in FP8
    for granularity in ("channel", "block")
}


def _readable(marker: Marker) -> bool:
    """Whether it says nothing that only ComfyUI knows how to read (`num_experts`, …)."""
    return marker["format"] in _FORMATS and set(marker) <= {"format", FULL_PRECISION}


def _markers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Marker]:
    """layer -> what the header or its marker tensor says of it."""
    markers = dict(_header_of(metadata)["layers"]) if QUANTIZATION_METADATA in metadata else {}
    for key, tensor in tensors.items():
        if key.endswith(MARKER):
            markers[key.removesuffix(MARKER)] = marker_of(key, tensor)
    return markers


def marker_of(key: str, tensor: Tensor) -> Marker:
    """What a marker tensor says; ValueError when it is no JSON object that names a format."""
    if tensor.dtype != torch.uint8 or tensor.numel() > LONGEST_MARKER:
        raise ValueError(f"{key} is no short text (uint8), which a marker is; {AGAIN}")
    try:
        marker = parse_json(bytes(tensor.flatten().tolist()), DEEPEST)
    except ValueError as error:
        raise ValueError(f"{key}: {error}; {AGAIN}") from error
    return _checked_marker(key, marker)


def _checked_marker(key: str, marker: Any) -> Marker:
    match marker:
        case {"format": str(name)} if name.isprintable() and len(name) <= LONGEST_FORMAT:
            return marker
    raise ValueError(f"{key} is marked {shown(marker)}, which names no format; {AGAIN}")


def _header_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON of the header, its layers checked."""
    header = parse_json(metadata[QUANTIZATION_METADATA], DEEPEST)
    if not isinstance(header, dict) or not isinstance(header.get("layers"), dict):
        raise ValueError(f"{QUANTIZATION_METADATA} names no layers; {AGAIN}")
    for layer, marker in header["layers"].items():
        _checked_marker(shown(layer), marker)
    return header


def _foreign(tensors: Mapping[str, Tensor], formats: set[str]) -> Fp8File:
    if unknown := sorted(f for f in formats if f.startswith(BRAID)):
        raise ValueError(f"written by a newer Braid ({', '.join(unknown[:5])}): update Braid")
    return Fp8File(
        origin=f"already quantised ({', '.join(sorted(formats)[:5])}): left to ComfyUI as it is",
        tensors=dict(tensors),
        scaled=(),
    )


def _scale_of(tensors: Mapping[str, Tensor], layer: str) -> Tensor | None:
    for suffix in ("weight_scale", "scale_weight"):
        if (scale := tensors.get(f"{layer}.{suffix}")) is not None:
            return scale
    return None


def without_prefix(source: TensorSource, prefix: str) -> TensorSource:
    """What a whole model holds under `prefix`, by its own names; all where it holds nothing."""
    tensors = {
        key.removeprefix(prefix): tensor
        for key, tensor in source.tensors.items()
        if key.startswith(prefix)
    }
    if not tensors:
        return source
    metadata = dict(source.metadata)
    if QUANTIZATION_METADATA in metadata:
        header = _header_of(metadata)
        layers = {name.removeprefix(prefix): marker for name, marker in header["layers"].items()}
        metadata[QUANTIZATION_METADATA] = json.dumps({**header, "layers": layers})
    return dataclasses.replace(source, tensors=tensors, metadata=metadata)


def _check_shape(layer: str, codes: Tensor, scale: Tensor) -> None:
    if not codes.numel() or not scale.is_floating_point():
        raise ValueError(
            f"{layer}: {codes.numel()} codes with a scale of {scale.dtype} are no FP8 weight; "
            f"{AGAIN}"
        )
    if codes.ndim != 2:
        raise ValueError(
            f"{layer}: scaled FP8 on a weight of shape {list(codes.shape)}; ComfyUI holds Linear "
            "weights [out, in] so and no others: quantise the bf16 file instead"
        )
    out, width = codes.shape
    blocks = scale.shape[1] if scale.ndim == 3 else 0
    per_block = blocks > 0 and width % blocks == 0 and tuple(scale.shape) == (out, blocks, 1)
    if not (scale.numel() == 1 or tuple(scale.shape) in ((out,), (out, 1)) or per_block):
        raise ValueError(
            f"{layer}: a scale of shape {list(scale.shape)} on a weight of {list(codes.shape)} is "
            "neither per tensor, per channel [out, 1] nor per block [out, blocks, 1]; "
            "quantise the bf16 file instead"
        )


def _origin(
    tensors: Mapping[str, Tensor], markers: Mapping[str, Marker], scales: Mapping[str, Tensor]
) -> str:
    if any(marker["format"].startswith(BRAID) for marker in markers.values()):
        return "saved by Braid"
    if markers or LEGACY_MARKER in tensors:
        return "ComfyUI's scaled FP8"
    fine = any(scale.numel() > 1 for scale in scales.values())
    return f"musubi-tuner's {'block- or channel-wise' if fine else 'per-tensor'} FP8"


def _one_form(
    tensors: Mapping[str, Tensor],
    codes: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    markers: Mapping[str, Marker],
) -> dict[str, Tensor]:
    unmarked = _legacy_marker(tensors.get(LEGACY_MARKER))
    form = {
        key: tensor
        for key, tensor in tensors.items()
        if key != LEGACY_MARKER
        and not key.endswith((".scale_weight", ".weight_scale", MARKER, ".scale_input"))
    }
    for key, tensor in tensors.items():
        if not key.endswith(".scale_input"):
            continue
        if tensor.numel() != 1:
            raise ValueError(f"{key} has shape {list(tensor.shape)}, not that of one number")
        if tensor.item() != 1.0:
            form[key.removesuffix("scale_input") + "input_scale"] = tensor
    for layer, scale in scales.items():
        out = codes[layer].shape[0]
        shape = () if scale.numel() == 1 else (out, 1) if scale.ndim < 3 else tuple(scale.shape)
        form[f"{layer}.weight_scale"] = scale.to(torch.float32).reshape(shape)
        marker = {**markers.get(layer, unmarked), "format": core_format(codes[layer].dtype)}
        form[f"{layer}.comfy_quant"] = comfy_quant(**marker)
    return form


def _legacy_marker(marker: Tensor | None) -> Marker:
    """What ComfyUI's older `scaled_fp8` tensor says of every layer: with two elements, this."""
    return {FULL_PRECISION: True} if marker is not None and marker.numel() == 2 else {}
