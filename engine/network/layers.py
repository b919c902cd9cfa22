"""The shape of a layer that can be adapted, read from its attributes, never from its weight.

A quantised or offloaded weight may be packed, absent or on another device; `in_features`,
`kernel_size` and the like are always there. ComfyUI's operations subclass torch's layers, but its
quantised Linear is a plain module that only looks like one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """A Linear (kernel ()) or a convolution over 1, 2 or 3 dimensions."""

    in_features: int
    """Input features or channels."""
    out_features: int
    """Output features or channels."""
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1

    @property
    def has_large_kernel(self) -> bool:
        """A convolution that looks at more than one position."""
        return any(size != 1 for size in self.kernel)

    @property
    def fan_in(self) -> int:
        """Inputs that one output sees: columns of the weight as a matrix."""
        return self.in_features * math.prod(self.kernel)

    def __str__(self) -> str:
        kind = f"Conv{len(self.kernel)}d" if self.kernel else "Linear"
        kernel = " " + "×".join(map(str, self.kernel)) if self.kernel else ""
        return f"{kind}{kernel} {self.in_features} → {self.out_features}"


def shape_of(module: nn.Module) -> LayerShape | None:
    """The shape of a Linear or convolution, None for any other module."""
    if is_linear(module):
        return LayerShape(in_features=module.in_features, out_features=module.out_features)
    if isinstance(module, _CONVOLUTIONS):
        return LayerShape(
            in_features=module.in_channels,
            out_features=module.out_channels,
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
            dilation=tuple(module.dilation),
            padding_mode=module.padding_mode,
            groups=module.groups,
        )
    return None


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is a linear layer; those that ComfyUI quantises only look like torch's."""
    return any(kind.__name__ == "Linear" for kind in type(module).__mro__) and (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerShape]]:
    """(dotted name, module, shape) of every Linear and convolution, in `named_modules` order."""
    for name, module in model.named_modules():
        shape = shape_of(module)
        if shape is not None and name:
            yield name, module, shape


def layer_shapes(model: nn.Module) -> dict[str, LayerShape]:
    """Dotted name → shape of every Linear and convolution of the model."""
    return {name: shape for name, _, shape in layers_of(model)}
