"""Which step of a schedule a model call belongs to."""

import bisect
from collections.abc import Hashable, Sequence

from torch import Tensor

SAME_LEVEL = 5e-4
"""Relative distance of noise levels that count as one: samplers compute a level in several ways."""


def same_level(sigma: float, other: float) -> bool:
    """Whether two noise levels are one, up to a sampler's rounding."""
    return abs(sigma - other) <= SAME_LEVEL * max(sigma, other)


class StepClock:
    """Where in the schedule a sampler is: ticks once for every call of the guider.

    For samplers that call once a step it counts; otherwise it reads the noise level, which waits
    for the device once a call.
    """

    def __init__(self, sigmas: Sequence[float], follows_schedule: bool) -> None:
        self.step = 0
        """Index of the present step."""
        self.sigma = 0.0
        """Noise level of the present call, as a Python float; 0 before the first."""
        self.on_schedule = True
        """Whether that is the step's own noise level, and not one between two steps."""
        self.seen: dict[Hashable, int] = {}
        """How often each conditioning came within this call of the guider."""
        self._sigmas = tuple(sigmas)
        self._falling = [-sigma for sigma in sigmas]
        self._follows = follows_schedule
        self._calls = 0

    def tick(self, timestep: Tensor) -> None:
        """The guider is called at `timestep` (B,), the noise level of every latent."""
        call = self._calls
        self._calls += 1
        self.seen.clear()
        if self._follows and call < len(self._sigmas) - 1:
            self.step, self.sigma, self.on_schedule = call, self._sigmas[call], True
        else:
            self._read(float(timestep.max()))

    def _read(self, sigma: float) -> None:
        below = sigma * (1.0 - SAME_LEVEL)  # SDE samplers call a little below the first level
        step = bisect.bisect_right(self._falling, -below) - 1
        self.step = min(max(step, 0), len(self._sigmas) - 2)
        self.sigma = sigma
        self.on_schedule = same_level(self._sigmas[self.step], sigma)
