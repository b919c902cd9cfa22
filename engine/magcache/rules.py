"""What a cache is told: the rule that decides which steps are skipped, and where it may."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .plan import MagCachePlan

MAX_PLANNED_K = 32
"""Most steps in a row that the planned rule weighs; what it takes grows with the square of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCacheRule:
    """MagCache (arXiv 2506.09045, Algorithm 1) with musubi-tuner's options and bounds."""

    threshold: float = 0.24
    """Largest accumulated |1 - ratio| of consecutive skipped steps; 0 turns the cache off (musubi's
    own rule still skips where the ratio is exactly 1)."""
    retention_ratio: float = 0.2
    """Part of the run, from its start, that is always computed."""
    k: int = 6
    """Most steps skipped in a row; 0 turns the cache off."""
    interpolation: Literal["cumulative", "nearest"] = "cumulative"
    """Ratios at other step counts: over sigma, or the nearest list entry as the authors do."""

    def __post_init__(self) -> None:
        if not self.threshold >= 0:  # not a number is not
            raise ValueError(f"threshold: got {self.threshold}, allowed are 0 and above")
        if not 0 <= self.retention_ratio <= 1:
            raise ValueError(f"retention_ratio: got {self.retention_ratio}, allowed is 0 to 1")
        if self.k < 0:
            raise ValueError(f"k: got {self.k}, allowed are 0 and above")
        if self.interpolation not in ("cumulative", "nearest"):
            raise ValueError(
                f"interpolation: got {self.interpolation!r}, allowed are cumulative and nearest"
            )

    @property
    def off(self) -> bool:
        """True when nothing may be skipped, whatever the ratios."""
        return self.threshold == 0 or self.k == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRule:
    """The schedule with the least predicted error for a wanted speed-up; needs a calibration."""

    speedup: float = 2.0
    """Steps over computed steps that the schedule must reach; 1 turns the cache off."""
    warmup_steps: int = 2
    """Steps computed at the start; extrapolation needs at least 2."""
    k: int = 6
    """Most steps skipped in a row; 0 turns the cache off."""
    predict: Literal["extrapolate", "reuse"] = "extrapolate"
    """A skipped step's residual: the line through the last two computed, or the last one."""
    max_error: float = 0.0
    """Instead of `speedup`: the fewest evaluations whose predicted error stays below; 0 = off."""

    def __post_init__(self) -> None:
        if not self.speedup >= 1:
            raise ValueError(f"speedup: got {self.speedup}, allowed are 1 and above")
        if self.warmup_steps < 1:
            raise ValueError(f"warmup_steps: got {self.warmup_steps}, allowed are 1 and above")
        if not 0 <= self.k <= MAX_PLANNED_K:
            raise ValueError(f"k: got {self.k}, allowed are 0 to {MAX_PLANNED_K}")
        if self.predict not in ("extrapolate", "reuse"):
            raise ValueError(f"predict: got {self.predict!r}, allowed are extrapolate and reuse")
        if not self.max_error >= 0:
            raise ValueError(f"max_error: got {self.max_error}, allowed are 0 and above")

    @property
    def off(self) -> bool:
        """True when nothing may be skipped, whatever was calibrated."""
        return self.k == 0 or (self.speedup == 1 and self.max_error == 0)

    @property
    def warmup(self) -> int:
        """Steps computed at the start, with the two that extrapolation needs."""
        return max(self.warmup_steps, 2) if self.predict == "extrapolate" else self.warmup_steps


Rule = MagCacheRule | PlannedRule


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCacheSettings:
    """Everything that a MagCache node is told."""

    plan: MagCachePlan
    """What is known of the model's residuals."""
    rule: Rule
    """How the steps to skip are chosen."""
    measure: str = "latent"
    """`latent` (the whole model's output) or `blocks` (the residual of the block stack)."""
    start_percent: float = 0.0
    """Steps before this part of the sampling process are computed."""
    end_percent: float = 1.0
    """Steps after this part of the sampling process are computed."""

    def __post_init__(self) -> None:
        if self.measure not in ("latent", "blocks"):
            raise ValueError(f"measure: got {self.measure!r}, allowed are latent and blocks")
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            raise ValueError(
                f"start_percent {self.start_percent} and end_percent {self.end_percent}: "
                "allowed is 0 <= start <= end <= 1"
            )


def accumulated_errors(
    curves: Sequence[Sequence[float]], rule: MagCacheRule, allowed: Sequence[bool]
) -> tuple[list[int], list[float]]:
    """Skipped steps, and the accumulated error at every step (0 where it is computed).

    `curves[c][i]` is the ratio of step i to step i - 1 for conditioning c; a step is skipped only
    when every conditioning may skip it, so that a skipped step costs no evaluation at all. With
    one curve this is the reference rule: E sums |1 - R| over consecutive skipped steps, R
    multiplies up.
    """
    steps = len(allowed)
    first = max(int(rule.retention_ratio * steps), 1)
    skipped: list[int] = []
    errors = [0.0] * steps
    ratio, error, run = [1.0] * len(curves), [0.0] * len(curves), 0
    for step in range(first, steps - 1):
        if not allowed[step]:
            ratio, error, run = [1.0] * len(curves), [0.0] * len(curves), 0
            continue
        ratio = [r * curve[step] for r, curve in zip(ratio, curves, strict=True)]
        error = [e + abs(1.0 - r) for e, r in zip(error, ratio, strict=True)]
        run += 1
        if max(error) <= rule.threshold and run <= rule.k:
            skipped.append(step)
            errors[step] = max(error)
        else:
            ratio, error, run = [1.0] * len(curves), [0.0] * len(curves), 0
    return skipped, errors
