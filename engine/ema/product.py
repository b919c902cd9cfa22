"""Averages what LoRA files add to the model (up·down), not their factors.

The average of N products of rank r has rank up to N·r. Its best approximation of rank r comes from
thin QR decompositions of the stacked factors and the SVD of the small core between them; the full
matrix (out x in) is never formed.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..disk.reading import AGAIN, DamagedFileError
from ..files import DTYPES, TensorEntry
from .layout import Source, is_averaged
from .merge import Merge, Progress
from .schedule import weights_from_betas

FACTOR_SUFFIXES = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)
"""How the keys of the two factors of one module end, down first."""
ADDED_SUFFIXES = (".diff", ".diff_b")
"""Tensors that are added to the model as they are: their average is exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refactored:
    """An average of products, back in two factors per module."""

    tensors: dict[str, Tensor]
    truncation_error: float
    """What the cut to the rank removed, relative to the averaged product (Frobenius norm)."""


def average_products(merge: Merge) -> Generator[Progress, None, Refactored]:
    """The state dict whose products are the averaged products, at the rank of the files.

    The scale alpha / rank is the same in every file and stays what it was, so it cancels.
    Raises ValueError for adapters that are not plain LoRA.
    """
    weights = weights_from_betas(np.array(merge.betas)).tolist()
    keys = merge.reference.header.tensors
    modules = _factor_pairs(merge.reference)
    factors = {key for pair in modules for key in pair}
    for key in sorted(keys.keys() - factors):
        if is_averaged(key, merge.sources) and not key.endswith(ADDED_SUFFIXES):
            raise ValueError(
                f"{merge.reference.path}: {key} does not belong to a plain LoRA, whose product "
                "up·down could be averaged; use space 'factors'"
            )
    tensors = {
        key: _average(key, merge, weights)
        if is_averaged(key, merge.sources)
        else merge.reference.read(key)
        for key in sorted(keys.keys() - factors)
    }
    removed = total = 0.0
    for done, (down, up) in enumerate(modules, start=1):
        try:
            product = refactor(
                [source.read_finite(up).flatten(1) for source in merge.sources],
                [source.read_finite(down).flatten(1) for source in merge.sources],
                weights,
            )
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # not in its stubs
            # numbers near the end of the range of float32
            raise ValueError(
                f"the products of {down} and {up} cannot be averaged ({error}); use space 'factors'"
            ) from error
        tensors[up] = _as_saved(product.up, up, merge.reference)
        tensors[down] = _as_saved(product.down, down, merge.reference)
        removed, total = removed + product.removed, total + product.total
        yield Progress(done, len(modules))
    truncation = (removed / total) ** 0.5 if total else 0.0
    return Refactored(tensors=tensors, truncation_error=truncation)


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One averaged product, cut to its first singular values."""

    up: Tensor
    """(out, rank)"""
    down: Tensor
    """(rank, in)"""
    removed: float
    """Squared Frobenius norm of what was cut."""
    total: float
    """Squared Frobenius norm of the averaged product."""


def refactor(ups: Sequence[Tensor], downs: Sequence[Tensor], weights: Sequence[float]) -> Product:
    """Best factors of the rank of the first pair for `sum(w * up @ down)` (Eckart-Young).

    ups (out, r), downs (r, in); weights at least 0. Costs O((out + in)·(N·r)^2).
    """
    rank = ups[0].shape[1]
    roots = [weight**0.5 for weight in weights]
    left = torch.cat([root * up for root, up in zip(roots, ups, strict=True)], dim=1)
    right = torch.cat([root * down for root, down in zip(roots, downs, strict=True)])
    q_left, r_left = torch.linalg.qr(left)  # (out, n), (n, N·r)
    q_right, r_right = torch.linalg.qr(right.T)  # (in, m), (m, N·r)
    # the core in float64: it holds squares, which leave the range of float32 where factors do not
    u, s, vh = torch.linalg.svd(r_left.double() @ r_right.double().T, full_matrices=False)
    root = s[:rank].sqrt()
    up = q_left @ (u[:, :rank] * root).float()
    down = (root[:, None] * vh[:rank]).float() @ q_right.T
    squares = s.square()
    return Product(
        up=_padded(up, rank, dim=1),
        down=_padded(down, rank, dim=0),
        removed=float(squares[rank:].sum()),
        total=float(squares.sum()),
    )


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Zero rank dimensions up to `rank`, for a layer smaller than its adapter's rank."""
    missing = rank - factor.shape[dim]
    padding = (0, missing) if dim == 1 else (0, 0, 0, missing)
    return torch.nn.functional.pad(factor, padding)


def _factor_pairs(source: Source) -> list[tuple[str, str]]:
    """(down key, up key) of every module; the up factor must be a matrix or a 1x1 convolution."""
    tensors = source.header.tensors
    pairs = [
        (key, key.removesuffix(down) + up)
        for key in tensors
        for down, up in FACTOR_SUFFIXES
        if key.endswith(down)
    ]
    for down, up in pairs:
        if up not in tensors:
            raise DamagedFileError(source.path, f"{down} has no {up} beside it; {AGAIN}")
        if not _are_factors(tensors[down], tensors[up]):
            raise DamagedFileError(
                source.path,
                f"{down} of shape {tensors[down].shape} and {up} of shape {tensors[up].shape} have "
                f"no rank in common; {AGAIN}",
            )
        if tensors[up].shape[2:].count(1) != len(tensors[up].shape[2:]):
            raise ValueError(
                f"{source.path}: {up} of shape {tensors[up].shape} is a convolution with a kernel, "
                "whose product with the down factor is not a matrix; use space 'factors'"
            )
    if not pairs:
        raise ValueError(
            f"{source.path}: no LoRA factors (lora_down and lora_up) to multiply; "
            "use space 'factors'"
        )
    return pairs


def _are_factors(down: TensorEntry, up: TensorEntry) -> bool:
    matrices = all(len(x.shape) >= 2 and math.prod(x.shape) > 0 for x in (down, up))
    return matrices and up.shape[1] == down.shape[0]


def _average(key: str, merge: Merge, weights: Sequence[float]) -> Tensor:
    values = [w * source.read_finite(key) for w, source in zip(weights, merge.sources, strict=True)]
    entry = merge.reference.header.tensors[key]
    return torch.stack(values).sum(dim=0).to(DTYPES[entry.dtype])


def _as_saved(factor: Tensor, key: str, reference: Source) -> Tensor:
    entry = reference.header.tensors[key]
    return factor.reshape(entry.shape).to(DTYPES[entry.dtype]).contiguous()
