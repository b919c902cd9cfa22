"""LoKr, as LyCORIS trains and saves it."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import LayerShape
from .adapter import Adapter, kaiming_


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
        kaiming_(self.w1, generator)
        if self._is_full:
            nn.init.zeros_(self.w2)
        else:
            kaiming_(self.w2_a, generator)
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


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """`dimension` as small × large: small = `factor` where that divides, else the largest divisor
    that is at most `factor` (or at most √dimension when factor is -1)."""
    limit = math.isqrt(dimension)
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = min(limit, factor) if factor > 0 else limit
    small = next(d for d in range(limit, 0, -1) if dimension % d == 0)
    return small, dimension // small
