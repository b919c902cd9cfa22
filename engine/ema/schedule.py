"""How much each checkpoint of a run counts: musubi-tuner's recursions and the exact weights.

Every schedule ends as one decay per further file, applied in training order:
`average = beta * average + (1 - beta) * next file`, starting from the first file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from ..refusals import refuse_outside
from .profile import (
    Floats,
    check_sigma_rel,
    cumulative_profile,
    gamma_from_sigma_rel,
    mean_cumulative_profile,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BetaRamp:
    """musubi's `--beta` and `--beta2`: a decay that goes linearly from first to last merge."""

    beta: float
    """Decay at the first merge, 0 to 1."""
    beta2: float
    """Decay at the last merge, 0 to 1; equal to `beta` for a constant decay."""

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("beta2", self.beta2)):
            refuse_outside(name, value, 0, 1, "0.95 is usual")


@dataclass(frozen=True, kw_only=True, slots=True)
class MusubiPower:
    """musubi's `--sigma_rel`: power-function decays that count files from 1 after the first.

    The first file is dropped and the spacing of the files is ignored; kept to reproduce its
    results.
    """

    sigma_rel: float
    """Spread of the profile relative to the length of training, 0 to 0.28868."""

    def __post_init__(self) -> None:
        check_sigma_rel(self.sigma_rel)


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """The power-function average of the piecewise-linear path through the checkpoints."""

    sigma_rel: float
    """Spread of the profile relative to the length of training, 0 to 0.28868."""

    def __post_init__(self) -> None:
        check_sigma_rel(self.sigma_rel)


Schedule = BetaRamp | MusubiPower | Power


def follows_musubi(schedule: Schedule) -> bool:
    """Whether a merge with this schedule has to give musubi-tuner's file bit for bit."""
    return not isinstance(schedule, Power)


def requested_sigma_rel(schedule: Schedule) -> float | None:
    """The spread that the schedule asks for; None for decays, which ask for none."""
    return None if isinstance(schedule, BetaRamp) else schedule.sigma_rel


def merge_betas(
    schedule: Schedule, times: Sequence[float] | Floats, windowed: bool = False
) -> Floats:
    """One decay per file after the first, (N - 1,); `times` as in `power_weights`."""
    merges = len(times) - 1
    match schedule:
        case BetaRamp(beta=beta, beta2=beta2):
            return beta + (beta2 - beta) * (np.arange(merges) / max(merges - 1, 1))
        case MusubiPower(sigma_rel=sigma_rel):
            return _musubi_betas(gamma_from_sigma_rel(sigma_rel), merges)
        case Power(sigma_rel=sigma_rel):
            gamma = gamma_from_sigma_rel(sigma_rel)
            return betas_from_weights(power_weights(gamma, times, windowed))


def _musubi_betas(gamma: float, merges: int) -> Floats:
    """`power_beta` of Eq. 127 at steps 1, 2, 3 …, by Python's own power as in musubi: numpy's may
    differ in the last bit."""
    kept = 1 - 1 / np.arange(1, merges + 1)
    return np.fromiter(map(pow, kept.tolist(), repeat(gamma + 1)), np.float64, merges)


def power_weights(gamma: float, times: Sequence[float] | Floats, windowed: bool = False) -> Floats:
    """Weights of snapshots at `times` under the power profile that ends at the last one, (N,).

    Between snapshots the parameters are taken to move in straight lines, which is exact for a
    linear trajectory and the conditional mean of a random walk. The weight of a snapshot is then
    the integral of the profile times a hat function, and by parts the difference of the mean
    cumulative profile of the two intervals beside it. Before the first snapshot the parameters are
    held at it; `windowed` leaves that time out instead, for a run whose beginning is not wanted.

    `times` are strictly increasing, counted from the start of training in any unit.
    """
    knots = np.asarray(times, dtype=np.float64)
    _check_times(knots)
    if len(knots) == 1:
        return np.ones(1)
    end = float(knots[-1])
    before = float(cumulative_profile(knots[0], end, gamma)) if windowed else 0.0
    means = mean_cumulative_profile(knots[:-1], knots[1:], end, gamma)
    return np.diff(means, prepend=before, append=1.0) / (1.0 - before)


def _check_times(knots: Floats) -> None:
    if knots.size == 0:
        raise ValueError("no checkpoints to average; choose at least one")
    if not (knots[0] >= 0 and (np.diff(knots) > 0).all()):
        raise ValueError(
            f"checkpoint times {knots.tolist()}: must increase from 0 or more; "
            "sort by step, or take out the file that is out of order"
        )


def betas_from_weights(weights: Floats) -> Floats:
    """The decays whose recursion gives `weights`: running sum before over running sum after."""
    running = np.cumsum(weights)
    return np.divide(
        running[:-1], running[1:], out=np.zeros(len(weights) - 1), where=running[1:] > 0
    )


def weights_from_betas(betas: Floats) -> Floats:
    """What each file counts after the whole recursion, (N,)."""
    kept_after = np.append(np.cumprod(betas[::-1])[::-1], 1.0)  # product of all later decays
    return np.append(1.0, 1.0 - betas) * kept_after


def achieved_centre_of_mass(weights: Floats, times: Sequence[float] | Floats) -> float:
    """Mean training time of the average as a fraction of the last."""
    knots = np.asarray(times, dtype=np.float64)
    return float(weights @ knots / knots[-1]) if knots[-1] > 0 else 1.0


def achieved_sigma_rel(weights: Floats, times: Sequence[float] | Floats) -> float:
    """Standard deviation of the training time of the average as a fraction of the last."""
    knots = np.asarray(times, dtype=np.float64)
    if knots[-1] <= 0:
        return 0.0
    offsets = knots / knots[-1] - achieved_centre_of_mass(weights, times)
    return float(np.sqrt(weights @ offsets**2))
