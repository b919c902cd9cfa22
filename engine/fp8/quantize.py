"""amax → weight scale → codes, on rows of a weight matrix; tensors only.

A weight [out, in] is cut into groups that share one scale: a row, a block of a row, or everything.
`code = round(weight / scale)` and `weight ≈ code * scale`. Rows are independent of each other, so
the codes do not depend on how many rows are handed in at a time.
"""

import torch
from torch import Tensor

from .dequantize import decode, row_chunks
from .policy import Fp8Policy

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
MUSUBI_SMALLEST_SCALE = 1e-8
SEARCHED_MULTIPLES = tuple(2.0 ** (k / 16) for k in range(-6, 15))


def not_finite(values: Tensor) -> FloatingPointError:
    """The error that counts the NaN and Inf in `values`."""
    return FloatingPointError(f"{(~torch.isfinite(values)).sum().item()} values are NaN or Inf")


def require_finite(values: Tensor) -> None:
    """FloatingPointError when a value is NaN or Inf."""
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(values)):
        raise not_finite(values)


def finite_amax(grouped: Tensor) -> Tensor:
    """Largest magnitude of each group [..., size] -> [..., 1]; FloatingPointError on NaN or Inf."""
    amax = grouped.abs().amax(-1, keepdim=True)
    if not torch.isfinite(amax).all():
        raise not_finite(grouped)
    return amax


def scale_from_amax(amax: Tensor, policy: Fp8Policy, source_dtype: torch.dtype) -> Tensor:
    """The float32 scale that carries `amax` (float32) to the largest code."""
    largest = torch.finfo(policy.dtype).max
    if policy.scale_rounding == "musubi":
        rounded = (amax.to(source_dtype) / largest).clamp(min=MUSUBI_SMALLEST_SCALE)
        return rounded.to(torch.float32)
    return (amax / largest).clamp(min=SMALLEST_SCALE)


def round_up_to_bfloat16(positive: Tensor) -> Tensor:
    """The nearest value at or above each positive float32 that bfloat16 can hold, in float32."""
    bits = positive.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def codes_of(grouped: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `grouped / scale` to the nearest code, ties to even; what is too large saturates.

    The quotient, not the product with a reciprocal: that changes 1.6 % of the codes.
    """
    return _saturated(grouped / scale, dtype)


def _saturated(quotient: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return quotient.clamp_(-largest, largest).to(dtype)


def _codes_by(grouped: Tensor, scale: Tensor, policy: Fp8Policy) -> Tensor:
    """`codes_of`, and musubi's where its scale of a tiny float16 group underflowed to 0."""
    quotient = grouped / scale
    if policy.scale_rounding == "musubi":
        quotient.nan_to_num_(0.0)  # 0 / 0; infinities saturate
    return _saturated(quotient, policy.dtype)


def squared_error(unit: Tensor, multiple: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over each group of (unit - code * multiple)²: [..., size] -> [..., 1].

    `unit` is the weight over its amax scale and `multiple` the scale tried over that scale: with
    both near 1 no square overflows or vanishes, whatever the size of the weight.
    """
    codes = codes_of(unit, multiple, dtype)
    return (decode(codes, torch.float32).mul_(multiple) - unit).square_().sum(-1, keepdim=True)


def least_squares_scale(grouped: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Of 21 scales around `scale` the one with the least squared error, for each group by itself.

    They span just more than one octave. A float's relative error repeats with every octave of the
    scale: only the alignment of its mantissa, the clipping and the subnormals are to be chosen.
    """
    unit = grouped / scale
    best, best_error = torch.ones_like(scale), torch.full_like(scale, torch.inf)
    for number in SEARCHED_MULTIPLES:
        multiple = torch.full_like(scale, number)
        error = squared_error(unit, multiple, dtype)
        better = error < best_error
        best = torch.where(better, multiple, best)
        best_error = torch.where(better, error, best_error)
    return (scale * best).clamp(min=SMALLEST_SCALE)


def quantize_rows(rows: Tensor, policy: Fp8Policy, group_size: int) -> tuple[Tensor, Tensor]:
    """Rows [n, in] of any float dtype -> codes [n, in] and scales [n, in / group_size, 1].

    Raises FloatingPointError when a value is NaN or Inf.
    """
    grouped = rows.to(torch.float32).view(rows.shape[0], -1, group_size)
    scale = scale_from_amax(finite_amax(grouped), policy, rows.dtype)
    if policy.scale_search == "mse":
        scale = least_squares_scale(grouped, scale, policy.dtype)
    return _codes_by(grouped, scale, policy).view(rows.shape), scale


def quantize_rows_by(rows: Tensor, scale: Tensor, policy: Fp8Policy) -> Tensor:
    """Rows [n, in] -> codes, with the tensor's own scale (0-d)."""
    return _codes_by(rows.to(torch.float32), scale, policy)


def tensor_scale(weight: Tensor, policy: Fp8Policy, device: torch.device) -> Tensor:
    """The one scale (0-d) of a whole weight [out, in], found in chunks of rows on `device`.

    It lies on bfloat16's grid (rounded up, so that nothing saturates): ComfyUI multiplies such
    weights by the scale cast to the compute dtype; an unrounded one would be off by up to 0.4 %.
    Raises FloatingPointError when a value is NaN or Inf.
    """
    chunks = list(row_chunks(weight.shape[0], weight.shape[1], device))

    def rows(chunk: slice) -> Tensor:
        return weight[chunk].to(device).to(torch.float32)

    amax = torch.stack([finite_amax(rows(chunk).view(-1)) for chunk in chunks]).amax()
    scale = scale_from_amax(amax, policy, weight.dtype)
    if policy.scale_rounding == "musubi":
        return scale
    if policy.scale_search == "amax":
        return round_up_to_bfloat16(scale)
    tried = scale * torch.tensor(SEARCHED_MULTIPLES, device=device)
    candidates = round_up_to_bfloat16(tried.clamp(min=SMALLEST_SCALE))
    errors = torch.zeros(len(candidates), dtype=torch.float64, device=device)
    for chunk in chunks:
        unit = rows(chunk) / scale
        for index, multiple in enumerate(candidates / scale):
            errors[index] += squared_error(unit, multiple, policy.dtype).sum(dtype=torch.float64)
    return candidates[errors.argmin()]
