"""The residuals of one run: at most two per evaluation, born and dropped with the run."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .clock import same_level


class Evaluation(NamedTuple):
    """Which evaluation of the model a residual belongs to.

    A residual is only ever added to a tensor of the same evaluation.
    """

    conditioning: int
    """Which of the guider's lists it is from: 0 positive, 1 negative."""
    uuid: Hashable
    """Which conditioning of that list."""
    frames: tuple[int, ...]
    """Frames of its context window; empty without one."""
    tensor: Hashable
    """Size of its batch, shape, dtype and device of its latents."""
    turn: int
    """How often it came by now within one call of the guider."""


class ConditioningNames:
    """Names for conditionings in the order they appear: positive, negative, positive 2 …"""

    def __init__(self) -> None:
        self._names: dict[Evaluation, str] = {}
        self._used: dict[str, int] = {}

    def name(self, evaluation: Evaluation) -> str:
        """The name of what is evaluated."""
        if evaluation not in self._names:
            index = evaluation.conditioning
            kind = ("positive", "negative")[index] if index < 2 else f"conditioning {index + 1}"
            self._used[kind] = self._used.get(kind, 0) + 1
            number = self._used[kind]
            self._names[evaluation] = kind if number == 1 else f"{kind} {number}"
        return self._names[evaluation]


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached residual."""

    step: int
    sigma: float
    residual: Tensor
    """(B, C, ...) velocity, or (B, L, D) residual of the blocks."""


class ResidualCache:
    """The last one or two computed residuals of every evaluation."""

    def __init__(self, extrapolate: bool) -> None:
        self._keep = 2 if extrapolate else 1
        self._entries: dict[Hashable, tuple[Entry, ...]] = {}

    def store(self, key: Hashable, step: int, sigma: float, residual: Tensor) -> None:
        """Remember `residual`; one stored at the same noise level is replaced.

        Two-calls-a-step samplers come to a level twice, with a rounding between: a line through
        those two would point anywhere.
        """
        older = [e for e in self._entries.get(key, ()) if not same_level(e.sigma, sigma)]
        kept = (*older, Entry(step, sigma, residual))
        self._entries[key] = kept[-self._keep :]

    def drop(self, key: Hashable) -> None:
        """Forget a conditioning, because what it computes has changed."""
        self._entries.pop(key, None)

    def holds(self, key: Hashable, step: int) -> bool:
        """True when there is a residual of `step`, or of a later one."""
        return key in self._entries and self._entries[key][-1].step >= step

    def line(self, key: Hashable, sigma: float) -> tuple[Entry, Entry | None, float]:
        """(newest, the one before or None, w): r(sigma) = newest + w (newest - before)."""
        entries = self._entries[key]
        newest = entries[-1]
        if len(entries) < 2:
            return newest, None, 0.0
        before = entries[0]
        return newest, before, (sigma - newest.sigma) / (newest.sigma - before.sigma)


def velocity(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """d = (x - D(x; sigma)) / sigma: velocity, or epsilon (Karras et al. 2022, Eq. 1)."""
    return (x - denoised).div_(sigma)


def denoised_on_line(
    x: Tensor, sigma: float, newest: Tensor, before: Tensor | None, w: float, out: Tensor
) -> None:
    """out = x - sigma (newest + w (newest - before)): one fused add, or two."""
    torch.add(x, newest, alpha=-sigma * (1.0 + w), out=out)
    if before is not None:
        out.add_(before, alpha=sigma * w)


def residual_on_line(newest: Tensor, before: Tensor | None, w: float, out: Tensor) -> None:
    """out = newest + w (newest - before)."""
    if before is None:
        out.copy_(newest)
    else:
        torch.lerp(before, newest, 1.0 + w, out=out)


def slices(batch: int, conditionings: int) -> list[slice]:
    """Where each conditioning lies in a batch of `batch`; empty when it cannot be told."""
    if conditionings == 0 or batch % conditionings:
        return []
    size = batch // conditionings
    return [slice(i * size, (i + 1) * size) for i in range(conditionings)]


def predicted_denoised(
    cache: ResidualCache, keys: Sequence[Hashable], x: Tensor, sigma: float
) -> Tensor:
    """The denoised latent of a skipped call, for every conditioning of the batch `x`."""
    out = torch.empty_like(x)
    for key, part in zip(keys, slices(x.shape[0], len(keys)), strict=True):
        newest, before, w = cache.line(key, sigma)
        older = before.residual if before else None
        denoised_on_line(x[part], sigma, newest.residual, older, w, out[part])
    return out


def predicted_residual(
    cache: ResidualCache, keys: Sequence[Hashable], hidden: Tensor, sigma: float
) -> Tensor:
    """The residual of a skipped block stack, for every conditioning of `hidden` (B, L, D)."""
    out = torch.empty_like(hidden)
    for key, part in zip(keys, slices(hidden.shape[0], len(keys)), strict=True):
        newest, before, w = cache.line(key, sigma)
        residual_on_line(newest.residual, before.residual if before else None, w, out[part])
    return out
