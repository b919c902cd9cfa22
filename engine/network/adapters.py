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
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LayerShape
from .spec import Kind

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

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

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


class LoRA(Adapter):
    """Two thin layers: down to `rank`, up again. For a convolution, down has its kernel."""

    KEYS = {"down": "lora_down.weight", "up": "lora_up.weight"}
    down: nn.Parameter
    up: nn.Parameter

    @staticmethod
    def parameter_shapes(shape: LayerShape, rank: int) -> dict[str, tuple[int, ...]]:
        ones = (1,) * len(shape.kernel)
        return {
            "down": (rank, shape.in_features, *shape.kernel),
            "up": (shape.out_features, rank, *ones),
        }

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """down uniform in ±1/√fan_in (Kaiming with a = √5), up zero, as kohya and musubi."""
        _kaiming_(self.down, generator)
        nn.init.zeros_(self.up)

    def delta(self, x: Tensor) -> Tensor:
        return self._pointwise(self._hidden(x), self._cast("up")) * self._scale_in_use

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        if self.shape.kernel or output.dtype != self._arithmetic_dtype or not output.numel():
            return super().add_to(output, x)
        if self._skips_this_call():
            return output
        # One kernel for scale, matmul and sum: no temporary of the output's size.
        hidden = self._hidden(x).reshape(-1, self.rank)
        base = output.reshape(-1, self.shape.out_features)
        up = self._cast("up")
        return torch.addmm(base, hidden, up.t(), alpha=self._scale_in_use).view_as(output)

    def delta_weight(self) -> Tensor:
        flat = self.up.flatten(1) @ self.down.flatten(1)
        return flat.reshape(self._weight_shape) * self.scale

    def _hidden(self, x: Tensor) -> Tensor:
        hidden = self._apply_weight(self._input(x), self._cast("down"))
        return self._dropped_ranks(self._dropped_neurons(hidden))

    def _dropped_ranks(self, hidden: Tensor) -> Tensor:
        """One mask over the ranks for each item of the batch, the same at every position."""
        if not self.training or not self.rank_dropout:
            return hidden
        batch, positions = hidden.shape[0], (1,) * (hidden.ndim - 2)
        mask = torch.rand((batch, self.rank), device=hidden.device) > self.rank_dropout
        return hidden * (
            mask.view(batch, self.rank, *positions)
            if self.shape.kernel
            else mask.view(batch, *positions, self.rank)
        )

    @property
    def _scale_in_use(self) -> float:
        """The scale, with the kept ranks scaled up by 1 / (1 - p) while training."""
        return self.scale / (1.0 - self.rank_dropout if self.training else 1.0)

    @property
    def _arithmetic_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.up.dtype


class LoHa(Adapter):
    """The Hadamard product of two low-rank matrices: rank up to rank² for the size of two LoRAs."""

    KEYS = {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    w1_a: nn.Parameter
    w1_b: nn.Parameter
    w2_a: nn.Parameter
    w2_b: nn.Parameter

    @staticmethod
    def parameter_shapes(shape: LayerShape, rank: int) -> dict[str, tuple[int, ...]]:
        a, b = (shape.out_features, rank), (rank, shape.fan_in)
        return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As LyCORIS: b factors standard normal, w1_a normal of 0.1, w2_a zero."""
        nn.init.normal_(self.w1_a, std=0.1, generator=generator)
        nn.init.normal_(self.w1_b, std=1.0, generator=generator)
        nn.init.normal_(self.w2_b, std=1.0, generator=generator)
        nn.init.zeros_(self.w2_a)

    def delta(self, x: Tensor) -> Tensor:
        x = self._dropped_neurons(self._input(x))
        factors = [self._cast(name) for name in self.KEYS]
        if self._thin_is_cheaper:
            down, up = _khatri_rao(*factors)
            hidden = self._apply_weight(x, down.reshape(-1, *self._weight_shape[1:]))
            delta = self._pointwise(hidden, up)
        else:
            delta = self._apply_weight(x, self._dense(*factors))
        return self._dropped_rows(delta * self.scale)

    def delta_weight(self) -> Tensor:
        return self._dense(self.w1_a, self.w1_b, self.w2_a, self.w2_b) * self.scale

    def _dense(self, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
        return ((w1_a @ w1_b) * (w2_a @ w2_b)).reshape(self._weight_shape)

    @property
    def _thin_is_cheaper(self) -> bool:
        """rank² thin columns cost less than the dense weight, and save nothing of its size."""
        rows, columns = self.shape.out_features, self.shape.fan_in
        return self.rank**2 * (rows + columns) < rows * columns


class LoKr(Adapter):
    """The Kronecker product of a small matrix and a large one, low-rank where that is smaller."""

    KEYS = {name: f"lokr_{name}" for name in ("w1", "w2", "w2_a", "w2_b")}
    w1: nn.Parameter
    w2: nn.Parameter  # of a full LoKr alone; the others have its two factors
    w2_a: nn.Parameter
    w2_b: nn.Parameter

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self._is_full:
            self.alpha = float(self.rank)  # so that every reader of its file finds a scale of 1

    @staticmethod
    def parameter_shapes(
        shape: LayerShape, rank: int, factor: int = -1
    ) -> dict[str, tuple[int, ...]]:
        out_small, out_large = factorization(shape.out_features, factor)
        in_small, in_large = factorization(shape.in_features, factor)
        columns = in_large * math.prod(shape.kernel)
        shapes: dict[str, tuple[int, ...]] = {"w1": (out_small, in_small)}
        if rank < max(out_large, in_large) / 2:
            return shapes | {"w2_a": (out_large, rank), "w2_b": (rank, columns)}
        return shapes | {"w2": (out_large, columns)}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As LyCORIS: w1 and w2_a Kaiming, the other factor of w2 (or all of it) zero."""
        _kaiming_(self.w1, generator)
        if self._is_full:
            nn.init.zeros_(self.w2)
        else:
            _kaiming_(self.w2_a, generator)
            nn.init.zeros_(self.w2_b)

    @property
    def _is_full(self) -> bool:
        return "w2" in self._parameters

    @property
    def scale(self) -> float:
        """alpha / rank; 1 when nothing is low-rank, as LyCORIS and ComfyUI read such files."""
        return 1.0 if self._is_full else self.alpha / self.rank

    def delta(self, x: Tensor) -> Tensor:
        x = self._dropped_neurons(self._input(x))
        if self.shape.kernel:
            return self._dropped_rows(self._apply_weight(x, self._dense(self._cast)) * self.scale)
        # (w1 ⊗ w2) x = w1 · X · w2ᵀ with x laid out as X (in_small, in_large)
        w1 = self._cast("w1")
        hidden = x.unflatten(-1, (w1.shape[1], -1))
        if self._is_full:
            hidden = F.linear(hidden, self._cast("w2"))
        else:
            hidden = F.linear(F.linear(hidden, self._cast("w2_b")), self._cast("w2_a"))
        return self._dropped_rows(torch.matmul(w1 * self.scale, hidden).flatten(-2))

    def delta_weight(self) -> Tensor:
        return self._dense(self._parameter) * self.scale

    def _dense(self, get: Callable[[str], Tensor]) -> Tensor:
        w2 = get("w2") if self._is_full else get("w2_a") @ get("w2_b")
        return torch.kron(get("w1"), w2).reshape(self._weight_shape)


ADAPTERS: dict[Kind, type[Adapter]] = {"lora": LoRA, "loha": LoHa, "lokr": LoKr}


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """`dimension` as small × large: small = `factor` where that divides, else the largest divisor
    that is at most `factor` (or at most √dimension when factor is -1)."""
    limit = math.isqrt(dimension)
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = min(limit, factor) if factor > 0 else limit
    small = next(d for d in range(limit, 0, -1) if dimension % d == 0)
    return small, dimension // small


def _khatri_rao(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of (w1_a w1_b) ∘ (w2_a w2_b) = up · down with rank² columns, never the full product.

    The Hadamard product of Σᵢ aᵢbᵢᵀ and Σⱼ cⱼdⱼᵀ is Σᵢⱼ (aᵢ∘cⱼ)(bᵢ∘dⱼ)ᵀ.
    """
    up = (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)  # (out, rank²)
    down = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)  # (rank², in·kernel)
    return down, up


def _kaiming_(tensor: Tensor, generator: torch.Generator | None) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
