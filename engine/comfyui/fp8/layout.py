"""FP8 weights with one scale per channel or block, as ComfyUI's own kind of quantised tensor.

ComfyUI's FP8 layout takes one scale per tensor; a finer one comes out wrong where a linear is
decomposed into transpose and matmul (under no_grad and with gradients). This layout keeps the
transpose as a flag, so every operation sees the right weight, autograd saves the FP8 codes and not
a dequantised copy, and cloning, moving, offloading, LoRA patches and saving work as for core's own.
The arithmetic is musubi-tuner's rule: dequantise to the compute dtype, multiply.
"""

import dataclasses
from functools import cache

import comfy.float
import torch
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    register_layout_class,
    register_layout_op,
)
from torch import Tensor

from ...fp8.dequantize import dequantize
from ...fp8.policy import Fp8Policy
from ...fp8.quantize import finite_amax, quantize_rows, scale_from_amax

LAYOUT = "BraidFp8Layout"


class BraidFp8Layout(QuantizedLayout):
    """FP8 codes [out, in] with a float32 scale [out, 1] or [out, blocks, 1]."""

    @dataclasses.dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale` belongs to the rows of the codes, also when the tensor is seen transposed."""

        transposed: bool = False

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: object = None,
        stochastic_rounding: int | None = None,
        inplace_ops: bool = False,
        group_size: int = 64,
        dtype: torch.dtype = torch.float8_e4m3fn,
    ) -> tuple[Tensor, "BraidFp8Layout.Params"]:
        """Quantise [out, in] anew; ComfyUI asks for this after it patched a weight with a LoRA.

        With a seed in `stochastic_rounding` the rounding is unbiased: to the nearest code, the part
        of a patch that is smaller than a code's spacing would be lost.
        """
        policy = Fp8Policy(fp8_format="e4m3fn" if dtype == torch.float8_e4m3fn else "e5m2")
        values = tensor.to(torch.float32)
        if stochastic_rounding:
            grouped = values.view(tensor.shape[0], -1, group_size)
            new_scale = scale_from_amax(finite_amax(grouped), policy, tensor.dtype)
            quotient = (grouped / new_scale).view(tensor.shape)
            codes = comfy.float.stochastic_rounding(quotient, dtype, seed=stochastic_rounding)
        else:
            codes, new_scale = quantize_rows(values, policy, group_size)
        if group_size == tensor.shape[1]:
            new_scale = new_scale.view(-1, 1)
        return codes, cls.Params(
            scale=new_scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape)
        )

    @classmethod
    def dequantize(cls, qdata: Tensor, params: "BraidFp8Layout.Params") -> Tensor:
        """The weight in its compute dtype, before a transpose that `params` may note."""
        return dequantize(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
        """Codes and scale."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(
        cls, qdata: Tensor, params: "BraidFp8Layout.Params"
    ) -> dict[str, Tensor]:
        """Suffix of the weight's key -> tensor, as ComfyUI names them."""
        return {"": qdata, "_scale": params.scale}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, object]:
        """What `quantize` needs to keep granularity and format."""
        codes, scale = cls.get_plain_tensors(qtensor)
        blocks = scale.shape[1] if scale.ndim == 3 else 1
        return {"group_size": codes.shape[1] // blocks, "dtype": codes.dtype}

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        """Never: codes are dequantised before they are multiplied."""
        return False


def _transposed(weight: QuantizedTensor, args: tuple, kwargs: dict) -> QuantizedTensor:
    params = weight._params
    flipped = dataclasses.replace(
        params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed
    )
    return QuantizedTensor(weight._qdata, LAYOUT, flipped)


@cache
def registered_layout() -> str:
    """Make the layout known to comfy-kitchen, once, and return its name."""
    register_layout_class(LAYOUT, BraidFp8Layout)
    register_layout_op(torch.ops.aten.t.default, BraidFp8Layout)(_transposed)
    return LAYOUT


def with_fine_scale(weight: QuantizedTensor) -> QuantizedTensor:
    """A weight that ComfyUI loaded into its per-tensor layout with a finer scale, in our layout."""
    params = BraidFp8Layout.Params(
        scale=weight._params.scale,
        orig_dtype=weight._params.orig_dtype,
        orig_shape=tuple(weight._params.orig_shape),
    )
    return QuantizedTensor(weight._qdata, registered_layout(), params)


def is_fine(weight: object) -> bool:
    """Whether `weight` is in our layout."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == LAYOUT
