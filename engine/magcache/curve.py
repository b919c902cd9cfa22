"""Magnitude ratios at noise levels where they were not measured.

The paper's code picks the nearest one-step ratio of the list. When fewer steps are run each gap
spans several measured steps, and their ratios multiply: ratio(a -> b) = exp(L(b) - L(a)), where L
is the cumulative log-magnitude over sigma. It holds for any step count, shift, range and sampler.
"""

import bisect
import math
import operator
from collections.abc import Sequence

LARGEST_LOG = 700.0
"""Of a ratio: its exponential is still a number. Outside the measured range a slope goes on."""


def falls(sigmas: Sequence[float]) -> bool:
    """True when every noise level lies below the one before; False when one is not a number."""
    return all(after < before for before, after in zip(sigmas, sigmas[1:], strict=False))


def nearest_ratios(ratios: Sequence[float], steps: int) -> list[float]:
    """The list resampled to `steps` values by nearest index, as the MagCache authors and musubi do.

    Halves round to even; one step takes the last value.
    """
    if steps == len(ratios):
        return list(ratios)
    if steps == 1:
        return [ratios[-1]]
    scale = (len(ratios) - 1) / (steps - 1)
    return [ratios[round(step * scale)] for step in range(steps)]


def log_magnitudes(ratios: Sequence[float]) -> list[float]:
    """L at each measured step: log |r_i| - log |r_0|, the running sum of the log-ratios."""
    logs, total = [], 0.0
    for index, ratio in enumerate(ratios):
        total += math.log(ratio) if index else 0.0
        logs.append(total)
    return logs


def interpolated(knots: Sequence[float], values: Sequence[float], at: float) -> float:
    """Linear interpolation over falling `knots`; outside, the slope of the last segment goes on."""
    if len(knots) == 1:
        return values[0]
    right = bisect.bisect_left(knots, -at, key=operator.neg)
    right = min(max(right, 1), len(knots) - 1)
    left = right - 1
    part = (knots[left] - at) / (knots[left] - knots[right])
    return values[left] + part * (values[right] - values[left])


def cumulative_ratios(
    ratios: Sequence[float], knots: Sequence[float], sigmas: Sequence[float]
) -> list[float]:
    """Ratio of each run step to the one before, from the magnitudes at the run's own `sigmas`.

    `knots` are the falling noise levels where `ratios` were measured, one for each. The first is 1.
    """
    logs = log_magnitudes(ratios)
    at = [interpolated(knots, logs, sigma) for sigma in sigmas]
    steps = zip(at, at[1:], strict=False)
    return [1.0] + [math.exp(min(now - before, LARGEST_LOG)) for before, now in steps]


def resampled_sigmas(sigmas: Sequence[float], steps: int) -> tuple[float, ...]:
    """`steps` + 1 noise levels with the shape of the schedule `sigmas`."""
    last = len(sigmas) - 1
    levels = []
    for step in range(steps + 1):
        position = step * last / steps
        left = min(int(position), last - 1)
        part = position - left
        levels.append(sigmas[left] + part * (sigmas[left + 1] - sigmas[left]))
    return tuple(levels)
