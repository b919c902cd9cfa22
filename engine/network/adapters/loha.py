"""LoHa, arXiv 2108.06098, as LyCORIS trains and saves it."""

import torch
from torch import Tensor, nn

from ..layers import LayerShape
from .adapter import Adapter


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


def _khatri_rao(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of (w1_a w1_b) ∘ (w2_a w2_b) = up · down with rank² columns, never the full product.

    The Hadamard product of Σᵢ aᵢbᵢᵀ and Σⱼ cⱼdⱼᵀ is Σᵢⱼ (aᵢ∘cⱼ)(bᵢ∘dⱼ)ᵀ.
    """
    up = (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)  # (out, rank²)
    down = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)  # (rank², in·kernel)
    return down, up
