"""The tensors of one adapted layer, apart from any file, and how row blocks of one weight join."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import Kind

_ROW_FACTORS = {"lora": ("up",), "loha": ("w1_a", "w2_a")}
_COLUMN_FACTORS = {"lora": ("down",), "loha": ("w1_b", "w2_b")}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterWeights:
    """The tensors of one adapted layer, whatever file they came from or go to."""

    kind: Kind
    """lora, loha or lokr."""
    tensors: Mapping[str, Tensor]
    """Parameter name as in `adapters` → tensor."""
    alpha: float
    """Numerator of the scale alpha / rank."""

    @property
    def rank(self) -> int:
        """Inner width of the factors."""
        return rank_of(self.kind, self.tensors)

    @property
    def rows(self) -> int:
        """Outputs of the layer; lora and loha only."""
        return self.tensors[_ROW_FACTORS[self.kind][0]].shape[0]


def rank_of(kind: Kind, tensors: Mapping[str, Tensor]) -> int:
    """Inner width of the factors of one adapter; 1 for a LoKr that is not low-rank at all."""
    inner = {"lora": "down", "loha": "w1_b", "lokr": "w2_b"}[kind]
    return tensors[inner].shape[0] if inner in tensors else 1


def row_blocks(parts: int, rows: int, columns: int) -> tuple[int, ...]:
    """Rows of each part of a joint weight: q is square, k and v alike, the mlp has the rest."""
    if parts == 1:
        return (rows,)
    if parts == 3:
        return (columns, (rows - columns) // 2, (rows - columns) // 2)
    return (columns, columns, columns, rows - 3 * columns)


def stacked(blocks: Mapping[int, AdapterWeights], sizes: tuple[int, ...]) -> AdapterWeights:
    """Row blocks of a weight, each with its own factors, as one pair of factors.

    Blocks that share their column factors (we write them so) keep their rank; others get a block
    diagonal of the sum of the ranks. Blocks that are absent stay zero.
    """
    first = next(iter(blocks.values()))
    rows, columns = _ROW_FACTORS[first.kind], _COLUMN_FACTORS[first.kind]
    scales = [block.alpha / block.rank for block in blocks.values()]
    alike = all(scale == scales[0] for scale in scales)
    shared = alike and all(
        torch.equal(block.tensors[c], first.tensors[c])
        for block in blocks.values()
        for c in columns
    )
    rank = first.rank if shared else sum(block.rank for block in blocks.values())
    tensors = {
        c: first.tensors[c] if shared else torch.cat([b.tensors[c] for b in blocks.values()])
        for c in columns
    }
    for factor in rows:
        tail = first.tensors[factor].shape[2:]
        joint = first.tensors[factor].new_zeros((sum(sizes), rank, *tail))
        start = 0
        for part, block in blocks.items():
            top = sum(sizes[:part])
            fold = 1.0 if alike or factor != rows[0] else block.alpha / block.rank
            at = slice(0, rank) if shared else slice(start, start + block.rank)
            joint[top : top + sizes[part], at] = block.tensors[factor] * fold
            start += block.rank
        tensors[factor] = joint
    alpha = rank * (scales[0] if alike else 1.0)
    return AdapterWeights(kind=first.kind, tensors=tensors, alpha=alpha)
