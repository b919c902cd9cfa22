"""Base layers that pass gradients to their input and never keep a copy of their weight.

ComfyUI makes weights under inference mode, where autograd refuses to save them; may keep them on
another device, quantised, or with LoRA patches applied on the fly; and adds to its residual streams
in place. While `frozen(model)` is entered, every linear and convolution of the model runs as an
autograd Function that remembers the *module* and fetches the weight again in backward, and norms
keep a copy of their input, so that plain autograd is exact and the base is neither copied nor
changed. Only small loose tensors (scales, position tables) that autograd would have to save are
replaced by copies for the while.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ops import CastWeightBiasOp
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...fp8.dequantize import dequantize
from ...network.layers import is_linear

logger = logging.getLogger("comfyui_braid.training")

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm: TypeAlias = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm


@contextmanager
def frozen_weight(
    module: nn.Linear | Convolution | Norm, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`module`'s weight and bias as plain tensors of `dtype` on `device`.

    What the host applies when it samples is applied here: moving from where it is offloaded, LoRA
    patches, dequantising. Layers of another pack that unpack their own weights (ComfyUI-GGUF's) do
    all that in a method `cast_bias_weight`. The tensors may live in a buffer of the host that its
    next layer will overwrite: they must not outlive the `with` block, and nothing may save them
    for backward.
    """
    if not isinstance(module, CastWeightBiasOp):
        bias = getattr(module, "bias", None)  # torch's RMSNorm has no such attribute
        yield module.weight.to(device, dtype), None if bias is None else bias.to(device, dtype)
        return
    if hasattr(module, "cast_bias_weight"):
        with torch.inference_mode():
            weight, bias = module.cast_bias_weight(dtype=dtype, device=device, bias_dtype=dtype)
        yield _plain(weight), None if bias is None else _plain(bias)
        return
    with torch.inference_mode():
        # want_requant: a patched weight is rounded alike when it is fetched again in backward
        weight, bias, stream = comfy.ops.cast_bias_weight(
            module,
            dtype=dtype,
            device=device,
            bias_dtype=dtype,
            offloadable=True,
            compute_dtype=dtype,
            want_requant=True,
        )
        plain = dequantized(weight) if isinstance(weight, QuantizedTensor) else weight
        plain = plain.to(dtype)
    try:
        yield _plain(plain), None if bias is None else _plain(bias)
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def _plain(tensor: Tensor) -> Tensor:
    """Without the class that another pack gave it, which would spread to every result."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor  # an alias of it would be a graph break for torch.compile
    return tensor.as_subclass(Tensor)


def dequantized(weight: QuantizedTensor) -> Tensor:
    """`weight` in its compute dtype; FP8 by Braid's table, which a CPU reads 7 times as fast."""
    if weight._layout_cls.startswith("TensorCoreFP8"):
        return dequantize(weight._qdata, weight._params.scale, weight.dtype)
    return weight.dequantize()


class FrozenLinear(torch.autograd.Function):
    """`x @ weight.T + bias` for x (N, in); saves nothing but the module."""

    @staticmethod
    def forward(ctx, x: Tensor, module: nn.Linear) -> Tensor:
        ctx.module = module
        return _linear(x, module)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        with frozen_weight(ctx.module, grad.dtype, grad.device) as (weight, _):
            return grad @ weight, None


class FrozenConvolution(torch.autograd.Function):
    """A convolution with zero padding; saves nothing but the module and the input's shape."""

    @staticmethod
    def forward(ctx, x: Tensor, module: Convolution, padding: tuple[int, ...]) -> Tensor:
        ctx.module, ctx.padding, ctx.shape = module, padding, x.shape
        return _convolution(x, module, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        module = ctx.module
        placeholder = grad.new_empty(1).expand(ctx.shape)  # only its shape is looked at
        with frozen_weight(module, grad.dtype, grad.device) as (weight, _):
            grad_input, _, _ = torch.ops.aten.convolution_backward(
                grad,
                placeholder,
                weight,
                None,
                module.stride,
                ctx.padding,
                module.dilation,
                False,
                (0,) * len(ctx.padding),
                module.groups,
                (True, False, False),
            )
        return grad_input, None, None


def _linear(x: Tensor, module: nn.Linear) -> Tensor:
    with frozen_weight(module, x.dtype, x.device) as (weight, bias):
        return F.linear(x, weight, bias)


def _convolution(x: Tensor, module: Convolution, padding: tuple[int, ...]) -> Tensor:
    with frozen_weight(module, x.dtype, x.device) as (weight, bias):
        return torch.convolution(
            x,
            weight,
            bias,
            module.stride,
            padding,
            module.dilation,
            False,
            (0,) * len(padding),
            module.groups,
        )


def _needs_graph(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _linear_forward(module: nn.Linear) -> Callable[..., Tensor]:
    smoothing = getattr(module, "pre_quant_scale", None)  # AWQ: belongs to the input of this layer

    def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        comfy.ops.run_every_op()
        if smoothing is not None:
            x = x * smoothing.to(x.device, x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        # reshaped outside the Function: models add in place to what a linear returns
        y = FrozenLinear.apply(rows, module) if _needs_graph(x) else _linear(rows, module)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return forward


def _convolution_forward(module: Convolution, padding: tuple[int, ...]) -> Callable[..., Tensor]:
    pads_itself = module.padding_mode != "zeros"
    still_to_pad = (0,) * len(padding) if pads_itself else padding

    def forward(x: Tensor) -> Tensor:
        comfy.ops.run_every_op()
        if pads_itself:
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        if _needs_graph(x):
            return FrozenConvolution.apply(x, module, still_to_pad)
        return _convolution(x, module, still_to_pad)

    return forward


def _norm_forward(module: Norm) -> Callable[..., Tensor]:
    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        match module:
            case nn.LayerNorm():
                return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
            case nn.RMSNorm():
                return F.rms_norm(x, module.normalized_shape, weight, module.eps)
            case _:
                return F.group_norm(x, module.num_groups, weight, bias, module.eps)

    def forward(x: Tensor) -> Tensor:
        comfy.ops.run_every_op()
        needs_graph = _needs_graph(x)
        if needs_graph:
            x = x.clone()  # the residual stream x is often added to in place later
        if module.weight is None:
            return norm(x, None, None)
        with frozen_weight(module, x.dtype, x.device) as (weight, bias):
            if needs_graph:
                weight = weight.clone()
                bias = None if bias is None else bias.clone()
            return norm(x, weight, bias)

    return forward


def _forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """The differentiable forward of one base layer, or None where its own already is."""
    if is_linear(module):
        return _linear_forward(module)
    if isinstance(module, Convolution) and not isinstance(module.padding, str):
        return _convolution_forward(module, module.padding)
    if isinstance(module, Norm):
        return _norm_forward(module)
    return None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Make `model` differentiable with respect to its activations while entered; then undo all.

    To be entered outside inference mode, after the model was loaded onto its device.
    """
    with ExitStack() as undo:
        copied = 0
        for module in model.modules():
            forward = _forward_of(module)
            if forward is not None:
                undo.enter_context(forward_replaced(module, forward))
            elif not isinstance(module, nn.Embedding):
                copied += _copy_loose_tensors(module, undo)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                undo.callback(_require_grad, parameter)
        logger.debug("%d bytes of loose tensors are copied for training", copied)
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Run `forward` for `module` while entered; whatever another pack had put there comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _copy_loose_tensors(module: nn.Module, undo: ExitStack) -> int:
    """Replace `module`'s own inference tensors by copies that autograd may save; bytes copied."""
    copied = 0
    owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for tensors in owned:
        for name, tensor in tensors.items():
            if tensor is None or not tensor.is_inference():
                continue
            copy = _plain(tensor).clone()
            if tensors is module._parameters:
                copy = nn.Parameter(copy, requires_grad=False)
            undo.callback(tensors.__setitem__, name, tensor)
            tensors[name] = copy
            copied += copy.nbytes
    return copied


def _require_grad(parameter: Tensor) -> None:
    with torch.inference_mode(parameter.is_inference()):
        parameter.requires_grad_(True)
