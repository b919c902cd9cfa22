"""LoRA on a weight that holds several layers, one adapter for each of them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import LayerShape
from .lora import LoRA


class SplitLoRA(LoRA):
    """One LoRA for each row block of a Linear, such as q, k and v, all of the same rank.

    `down` holds their down matrices one below the other, (blocks · rank, in), and `up` their up
    matrices, (out, rank): as many numbers as separate LoRAs have, and one matmul for all downs.
    Files hold it as a single LoRA of rank blocks · rank, whose up matrix is block diagonal: what
    every program that has the layer in one reads, musubi-tuner and sd-scripts write it so.
    """

    def __init__(
        self,
        shape: LayerShape,
        parameters: dict[str, Tensor],
        *,
        rows: tuple[int, ...],
        **rest: Any,
    ) -> None:
        """rows: outputs of each block, from the top."""
        super().__init__(shape, parameters, **rest)
        self.rows = rows

    @staticmethod
    def parameter_shapes(
        shape: LayerShape, rank: int, blocks: int = 1
    ) -> dict[str, tuple[int, ...]]:
        return {"down": (blocks * rank, shape.in_features), "up": (shape.out_features, rank)}

    @property
    def filed_alpha(self) -> float:
        """For the same scale alpha / rank at the rank that the file has."""
        return self.alpha * len(self.rows)

    def filed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        up = torch.block_diag(*tensors["up"].split(self.rows))
        return {"down": tensors["down"], "up": up}

    def take(self, tensors: Mapping[str, Tensor], alpha: float) -> None:
        blocks = diagonal_blocks(tensors["up"], self.rows)
        if blocks is None:
            raise ValueError(
                "the file has one adapter for all of the layer, and the network one for each of "
                f"its {len(self.rows)} parts; switch split_qkv off"
            )
        super().take({**tensors, "up": torch.cat(blocks)}, alpha / len(self.rows))

    def pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple(zip(self.up.split(self.rows), self.down.split(self.rank), strict=True))

    def _raised(self, hidden: Tensor) -> Tensor:
        ups = self._cast("up").split(self.rows)
        inner = hidden.split(self.rank, -1)
        return torch.cat([F.linear(h, up) for h, up in zip(inner, ups, strict=True)], -1)

    def _summed(self, base: Tensor, hidden: Tensor) -> Tensor:
        ups = self._cast("up").split(self.rows)
        blocks = zip(base.split(self.rows, 1), hidden.split(self.rank, 1), ups, strict=True)
        scale = self._scale_in_use
        return torch.cat([torch.addmm(b, h, up.t(), alpha=scale) for b, h, up in blocks], 1)


def diagonal_blocks(matrix: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, ...] | None:
    """The blocks of a matrix that is zero beside them, with these rows and of one width.

    None where it is no such matrix.
    """
    width, rest = divmod(matrix.shape[1], len(rows))
    if rest or matrix.ndim != 2 or matrix.shape[0] != sum(rows):
        return None
    blocks = tuple(
        strip[:, i * width : (i + 1) * width] for i, strip in enumerate(matrix.split(rows))
    )
    inside = sum(int(block.count_nonzero()) for block in blocks)
    return blocks if inside == int(matrix.count_nonzero()) else None
