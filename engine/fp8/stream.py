"""A model's tensors, quantised one at a time while they are read; never a copy of the whole."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .dequantize import dequantize, row_chunks
from .model_file import comfy_quant, core_format
from .policy import Decision, Fp8Policy
from .quantize import quantize_rows, quantize_rows_by, require_finite, tensor_scale
from .report import LayerReport

MEASURED_CHUNKS = 8
"""The error is measured on every eighth chunk of rows, the first included."""

Merge = Callable[[str, Tensor], Tensor]
"""(key, tensor) -> the tensor with a LoRA merged, in float32, or the same tensor untouched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    """One weight [out, in] in FP8."""

    codes: Tensor
    scale: Tensor
    """float32: 0-d, [out, 1] or [out, blocks, 1]."""
    relative_rms: float
    """‖weight - dequantised‖ / ‖weight‖, over the measured rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Streamed:
    """What one tensor of the source became."""

    tensors: dict[str, Tensor]
    """In ComfyUI's keys; what was kept is the source's tensor itself."""
    layer: LayerReport | None
    """None for what is no Linear weight: biases, norms, embeddings, convolutions."""


def quantize_weight(weight: Tensor, policy: Fp8Policy, device: torch.device) -> QuantizedWeight:
    """Quantise `weight` [out, in] in chunks of rows on `device`; the codes come back to the CPU.

    Raises FloatingPointError when a value is NaN or Inf.
    """
    group_size = policy.group_size(weight.shape[1])
    codes = torch.empty(weight.shape, dtype=policy.dtype)
    scales = [tensor_scale(weight, policy, device)] if group_size is None else []
    error = power = 0.0
    for index, rows in enumerate(row_chunks(weight.shape[0], weight.shape[1], device)):
        values = weight[rows].to(device)
        if group_size is None:
            scale = scales[0]
            chunk = quantize_rows_by(values, scale, policy)
        else:
            chunk, scale = quantize_rows(values, policy, group_size)
            scales.append(scale.cpu())
        codes[rows] = chunk
        if index % MEASURED_CHUNKS == 0:
            exact = values.to(torch.float32)
            error += _power(dequantize(chunk, scale, torch.float32).sub_(exact))
            power += _power(exact)
    scale = scales[0].cpu() if group_size is None else torch.cat(scales)
    if group_size == weight.shape[1]:
        scale = scale.view(-1, 1)
    return QuantizedWeight(
        codes=codes, scale=scale, relative_rms=(error / power) ** 0.5 if power else 0.0
    )


def _power(values: Tensor) -> float:
    """Sum of squares, in double precision."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def quantized_stream(
    tensors: Mapping[str, Tensor],
    decisions: Mapping[str, Decision],
    policy: Fp8Policy,
    device: torch.device,
    merge: Merge | None = None,
) -> Iterator[Streamed]:
    """Yield every tensor of `tensors`, the Linear weights that `decisions` names quantised.

    `decisions` is keyed like `tensors` and holds Linear weights only. ValueError names the Linear
    weight, quantised or kept, that is no matrix of numbers or holds NaN or Inf.
    """
    for key, tensor in tensors.items():
        decision = decisions.get(key)
        if decision is not None:
            _check_weight(key, tensor)
        merged = tensor if merge is None else merge(key, tensor)
        try:
            if decision is not None and decision.quantize:
                quantized = quantize_weight(merged, policy, device)
                streamed = _quantized(key, tensor, quantized, decision)
            else:
                streamed = _kept(key, tensor, merged, decision)
        except FloatingPointError as error:
            raise ValueError(
                f"{key}: {error}; the source file is damaged, download or save it again"
            ) from error
        yield streamed


def _check_weight(key: str, tensor: Tensor) -> None:
    is_number = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    if tensor.ndim != 2 or not tensor.numel() or not is_number:
        raise ValueError(
            f"{key} is {tensor.dtype} of shape {list(tensor.shape)}, which is no Linear's weight; "
            "the source file is damaged, download or save it again"
        )


def _kept(key: str, tensor: Tensor, merged: Tensor, decision: Decision | None) -> Streamed:
    kept = tensor if merged is tensor else merged.to(tensor.dtype)
    layer = None
    if decision is not None:
        require_finite(kept)
        layer = LayerReport(
            name=key.removesuffix(".weight"),
            shape=tuple(tensor.shape),
            quantized=False,
            reason=decision.reason,
            bytes_before=tensor.nbytes,
            bytes_after=kept.nbytes,
        )
    return Streamed(tensors={key: kept}, layer=layer)


def _quantized(
    key: str, tensor: Tensor, quantized: QuantizedWeight, decision: Decision
) -> Streamed:
    name = key.removesuffix(".weight")
    codes, scale = quantized.codes, quantized.scale
    return Streamed(
        tensors={
            key: codes,
            f"{name}.weight_scale": scale,
            f"{name}.comfy_quant": comfy_quant(core_format(codes.dtype)),
        },
        layer=LayerReport(
            name=name,
            shape=tuple(tensor.shape),
            quantized=True,
            reason=decision.reason,
            granularity=granularity_of(scale),
            relative_rms=quantized.relative_rms,
            bytes_before=tensor.nbytes,
            bytes_after=codes.nbytes + scale.nbytes,
        ),
    )


def granularity_of(scale: Tensor) -> str:
    """tensor, channel or block, by the shape of a scale."""
    return {0: "tensor", 2: "channel", 3: "block"}[scale.ndim]
