"""The tensors of one adapted layer, how row blocks of one weight join, and the diffusers form."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters.split_lora import diagonal_blocks
from .architectures import Architecture
from .layers import LayerShape
from .spec import Kind

_ROW_FACTORS = {"lora": ("up",), "loha": ("w1_a", "w2_a")}
_COLUMN_FACTORS = {"lora": ("down",), "loha": ("w1_b", "w2_b")}
_PRODUCTS = {
    "lora": (("up", "down"),),
    "loha": (("w1_a", "w1_b"), ("w2_a", "w2_b")),
    "lokr": (("w1_a", "w1_b"), ("w2_a", "w2_b")),
}
"""Factors that are multiplied: the columns of the first are the rows of the second."""
_COMPLETE = {
    "lora": [{"down", "up"}],
    "loha": [{"w1_a", "w1_b", "w2_a", "w2_b"}],
    "lokr": [{"w1", "w2"}, {"w1", "w2_a", "w2_b"}],
}
LARGEST_SMALL_FACTOR = 1 << 24
"""Elements of the small Kronecker factor of a LoKr where a file holds it as a product."""


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


def checked_weights(
    name: str, kind: Kind, tensors: Mapping[str, Tensor], alpha: Tensor | None
) -> AdapterWeights:
    """The weights of layer `name` as a file holds them, alpha the rank where it has none.

    A LoKr whose small factor is a product gets it in full. ValueError says what is missing or does
    not fit.
    """
    check_factors(name, kind, tensors)
    # torch has no arithmetic of 8-bit floats
    parameters = {k: t.float() if t.dtype.itemsize == 1 else t for k, t in tensors.items()}
    if kind == "lokr" and {"w1_a", "w1_b"} <= set(parameters):
        parameters["w1"] = _small_factor(name, parameters.pop("w1_a"), parameters.pop("w1_b"))
    if set(parameters) not in _COMPLETE[kind]:
        raise ValueError(f"the file holds only {', '.join(parameters)} of the {kind} of {name}")
    rank = rank_of(kind, parameters)
    return AdapterWeights(
        kind=kind,
        tensors=parameters,
        alpha=float(rank) if alpha is None else _alpha_of(name, alpha),
    )


def _small_factor(name: str, w1_a: Tensor, w1_b: Tensor) -> Tensor:
    rows, columns = w1_a.shape[0], w1_b[0].numel()
    if rows * columns > LARGEST_SMALL_FACTOR:
        raise ValueError(f"the small factor of the lokr of {name} would be {rows} × {columns}")
    return w1_a.float().flatten(1) @ w1_b.float().flatten(1)


def _alpha_of(name: str, tensor: Tensor) -> float:
    alpha = float(tensor) if tensor.numel() == 1 else math.nan
    if not math.isfinite(alpha):
        raise ValueError(f"the alpha of {name} is {tensor.flatten()[:4].tolist()}, not one number")
    return alpha


def check_factors(name: str, kind: Kind, tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless the tensors of the adapter of layer `name` can be multiplied."""
    for key, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.numel() or not tensor.is_floating_point():
            raise ValueError(
                f"{key} of {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, which is no "
                "matrix of numbers"
            )
    ranks = [
        (tensors[first].flatten(1).shape[1], tensors[second].shape[0])
        for first, second in _PRODUCTS[kind]
        if first in tensors and second in tensors
    ]
    if any(one != other for one, other in ranks) or (kind == "loha" and len(set(ranks)) > 1):
        widths = ", ".join(f"{one} and {other}" for one, other in ranks)
        raise ValueError(f"the factors of the {kind} of {name} do not fit (ranks {widths})")


def delta_shape(kind: Kind, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(rows, columns) of the change that factors make, which `check_factors` has seen."""
    if kind == "lora":
        return tensors["up"].shape[0], tensors["down"][0].numel()
    if kind == "loha":
        return tensors["w1_a"].shape[0], tensors["w1_b"][0].numel()
    last = tensors["w2"] if "w2" in tensors else tensors["w2_b"]
    rows = tensors["w2" if "w2" in tensors else "w2_a"].shape[0]
    return tensors["w1"].shape[0] * rows, tensors["w1"][0].numel() * last[0].numel()


def row_blocks(parts: int, rows: int, columns: int) -> tuple[int, ...]:
    """Rows of each part of a joint weight: q is square, k and v alike, the mlp has the rest."""
    if parts == 1:
        return (rows,)
    if parts == 3:
        return (columns, (rows - columns) // 2, (rows - columns) // 2)
    return (columns, columns, columns, rows - 3 * columns)


def parts_of(name: str, shape: LayerShape, architecture: Architecture) -> tuple[int, ...]:
    """Rows of q, k and v (and mlp) of a layer that holds them in one weight; () for any other."""
    renames = (*architecture.diffusers, *architecture.musubi)
    count = max((rename.parts_of(name) for rename in renames), default=1)
    if count == 1 or shape.kernel:
        return ()
    sizes = row_blocks(count, shape.out_features, shape.in_features)
    # k and v have as many heads as q, or fewer; anything else is no q, k, v
    fits = sum(sizes) == shape.out_features and 0 < sizes[1] <= sizes[0] and sizes[-1] > 0
    return sizes if fits else ()


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


def diffusers_state(
    weights: Mapping[str, AdapterWeights], architecture: Architecture
) -> dict[str, Tensor]:
    """Dotted layer name → weights, as a state dict under diffusers' names that ComfyUI reads too.

    Alpha is folded into the matrices, √(alpha / rank) into each, because not every reader honours
    an alpha key there; where our layer is several in diffusers its rows are split among them, and
    so are the ranks of a LoRA that has its own for each (split_qkv). The names are the table's;
    models that no row detects keep ComfyUI's, some of which diffusers converts. A test loads what
    is written here with diffusers itself.
    ValueError, before any tensor is made, when diffusers and ComfyUI do not both read such a file.
    """
    if architecture.diffusers_cannot:
        raise ValueError(
            f"key_format diffusers: {architecture.title}: {architecture.diffusers_cannot}; "
            "choose comfyui or kohya"
        )
    names = {name: _names_there(name, architecture) for name in weights}
    return {
        key: tensor
        for name, layer in weights.items()
        for key, tensor in _tensors(name, layer, names[name], architecture)
    }


def _names_there(name: str, architecture: Architecture) -> tuple[str, ...]:
    """The name, or names from the top of the rows, of our layer `name` in diffusers."""
    others = next((o for rename in architecture.diffusers if (o := rename.of(name))), ())
    if not others and re.fullmatch(architecture.diffusers_keeps, name):
        return (name,)
    if not others:
        raise ValueError(
            f"key_format diffusers: diffusers has no name for {name} of {architecture.title}; "
            "leave that layer out or choose comfyui"
        )
    return others


def _tensors(
    name: str, layer: AdapterWeights, others: tuple[str, ...], architecture: Architecture
) -> Iterable[tuple[str, Tensor]]:
    if layer.kind != "lora":
        raise ValueError(
            f"key_format diffusers: diffusers loads LoRA only, and {name} has a {layer.kind}; "
            "choose comfyui or kohya"
        )
    if layer.alpha < 0:
        raise ValueError(
            f"key_format diffusers: alpha is folded into both factors, and that of {name} is "
            f"{layer.alpha:g}; choose comfyui or kohya"
        )
    fold = math.sqrt(layer.alpha / layer.rank)
    down, up = layer.tensors["down"] * fold, layer.tensors["up"] * fold
    sizes = row_blocks(len(others), up.shape[0], down.shape[1])
    if min(sizes) < 0 or sum(sizes) != up.shape[0]:
        raise ValueError(
            f"key_format diffusers: the {up.shape[0]} rows of {name} are not those of its "
            f"{len(others)} parts there; choose comfyui or kohya"
        )
    for other, factors in zip(others, _separated(down, up, sizes), strict=True):
        for suffix, factor in zip(architecture.diffusers_suffixes, factors, strict=True):
            # An attention layer of a U-Net by the name of its processor, to_q_lora
            joined = suffix.replace(".lora", "_lora", 1) if ".processor." in other else suffix
            # Copies: safetensors writes no two tensors that share memory.
            yield f"{architecture.diffusers_prefix}{other}{joined}", factor.clone()


def _separated(
    down: Tensor, up: Tensor, sizes: tuple[int, ...]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """(down, up) of each row block: its own ranks where the blocks share none, else all of them."""
    blocks = diagonal_blocks(up, sizes) if len(sizes) > 1 and up.any() else None
    if blocks is None:
        return tuple((down, rows) for rows in up.split(sizes))
    return tuple(zip(down.split(blocks[0].shape[1]), blocks, strict=True))
