"""LoRA, LoHa and LoKr: the maths of one adapted layer each.

An adapter computes the *change of a layer's output* for its input and never sees the base weight,
so the base may be quantised, offloaded or shared. `delta_weight` is the same change as a weight,
for merging. W is (out, in·kernel); s = alpha / rank:

    LoRA   ΔW = s · up · down                               Hu et al. 2021, arXiv 2106.09685, eq. 3
    LoHa   ΔW = s · (w1_a · w1_b) ∘ (w2_a · w2_b)           FedPara, arXiv 2108.06098, prop. 1
    LoKr   ΔW = s · w1 ⊗ w2,  w2 = w2_a · w2_b or full      LyCORIS, arXiv 2309.14859, section 3

Parameters are float32 and are cast to `compute_dtype` for each call; the sum with the base output
is rounded once, to the base's dtype.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import LayerShape

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Adapter(nn.Module):
    """What the three kinds share: scale, dropouts and dtypes."""

    KEYS: ClassVar[dict[str, str]]
    """Parameter name → its suffix in an adapter file."""

    def __init__(
        self,
        shape: LayerShape,
        parameters: dict[str, Tensor],
        *,
        alpha: float,
        rank: int,
        neuron_dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.rank = rank
        self.alpha = float(alpha)
        self.neuron_dropout = neuron_dropout
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.compute_dtype: torch.dtype | None = None
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))

    @staticmethod
    def parameter_shapes(shape: LayerShape, rank: int) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its name."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Give the parameters the values that a training starts from; ΔW is then zero."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def filed_alpha(self) -> float:
        """Alpha in an adapter file."""
        return self.alpha

    def filed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What an adapter file holds where the parameters are `tensors`; linear in them, so that
        averages of parameters become averages of files."""
        return dict(tensors)

    def take(self, tensors: Mapping[str, Tensor], alpha: float) -> None:
        """Copy what a file holds into the parameters; ValueError when they cannot hold it."""
        self.alpha = alpha
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(tensors[name])

    def delta(self, x: Tensor) -> Tensor:
        """The change of the layer's output for input `x`, scaled, in the compute dtype."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """The change as a weight, of the layer's weight shape, scaled, without dropout."""
        raise NotImplementedError

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """`output` + delta(x), in the dtype of `output`; `output` is left as it is."""
        if self._skips_this_call():
            return output
        return (output + self.delta(x)).to(output.dtype)

    def _skips_this_call(self) -> bool:
        """Module dropout: one draw a call, on the CPU, so that nothing waits for a device."""
        if not self.training or not self.module_dropout:
            return False
        return bool(torch.rand(1) < self.module_dropout)

    def _cast(self, name: str) -> Tensor:
        parameter = self._parameter(name)
        return parameter if self.compute_dtype is None else parameter.to(self.compute_dtype)

    def _parameter(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name)
        return tensor

    def _input(self, x: Tensor) -> Tensor:
        """`x` in the dtype of the adapter's arithmetic."""
        return x.to(self.compute_dtype or next(self.parameters()).dtype)

    def _dropped_neurons(self, activations: Tensor) -> Tensor:
        if not self.training or not self.neuron_dropout:
            return activations
        return F.dropout(activations, self.neuron_dropout)

    def _dropped_rows(self, delta: Tensor) -> Tensor:
        """Rank dropout of an adapter without a common rank, as in LyCORIS and musubi: rows of ΔW,
        that is outputs of the layer, one mask a call; what is kept is scaled up."""
        if not self.training or not self.rank_dropout:
            return delta
        kept = torch.rand(self.shape.out_features, device=delta.device) > self.rank_dropout
        return delta * (kept / (1.0 - self.rank_dropout)).to(delta).view(-1, *self._ones)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's own operation (stride, padding, dilation) with another weight, no bias."""
        shape = self.shape
        if not shape.kernel:
            return F.linear(x, weight)
        convolve = _CONVOLVE[len(shape.kernel)]
        return convolve(
            x, weight, None, stride=shape.stride, padding=shape.padding, dilation=shape.dilation
        )

    def _pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """A Linear over the channels: a 1 × 1 convolution where the layer is a convolution."""
        if not self.shape.kernel:
            return F.linear(x, weight)
        return _CONVOLVE[len(self.shape.kernel)](x, weight.reshape(*weight.shape[:2], *self._ones))

    @property
    def _ones(self) -> tuple[int, ...]:
        return (1,) * len(self.shape.kernel)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return (self.shape.out_features, self.shape.in_features, *self.shape.kernel)


def kaiming_(tensor: Tensor, generator: torch.Generator | None) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
