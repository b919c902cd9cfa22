"""Which step of a schedule a model call belongs to."""

import bisect
from collections.abc import Sequence

from torch import Tensor

SAME_LEVEL = 5e-4
"""Relative distance of noise levels that count as one: samplers compute a level in several ways."""


def same_level(sigma: float, other: float) -> bool:
    """Whether two noise levels are one, up to a sampler's rounding."""
    return abs(sigma - other) <= SAME_LEVEL * max(sigma, other)


class StepClock:
    """Which step of the schedule a model call belongs to, and its noise level as a Python float.

    For samplers that call once a step it counts; otherwise it reads the noise level, which waits
    for the device once a call.
    """

    def __init__(self, sigmas: Sequence[float], follows_schedule: bool) -> None:
        self._sigmas = tuple(sigmas)
        self._falling = [-sigma for sigma in sigmas]
        self._follows = follows_schedule
        self._calls = 0

    def tick(self, timestep: Tensor) -> tuple[int, float, bool]:
        """Step index, sigma and whether sigma is that step's own level, for the next call."""
        step = self._calls
        self._calls += 1
        if self._follows and step < len(self._sigmas) - 1:
            return step, self._sigmas[step], True
        return self._read(float(timestep.max()))

    def _read(self, sigma: float) -> tuple[int, float, bool]:
        below = sigma * (1.0 - SAME_LEVEL)  # SDE samplers call a little below the first level
        step = bisect.bisect_right(self._falling, -below) - 1
        step = min(max(step, 0), len(self._sigmas) - 2)
        return step, sigma, same_level(self._sigmas[step], sigma)
