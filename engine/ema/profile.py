"""The power-function averaging profile, one function per equation.

Equation numbers are those of Karras et al., "Analyzing and Improving the Training Dynamics of
Diffusion Models" (arXiv 2312.02696). Training time runs from 0 to T in any unit; `sigma_rel` is the
standard deviation of the profile divided by T, `gamma` its exponent. All in float64.
"""

import numpy as np
from numpy.typing import NDArray

from ..texts import Text

Floats = NDArray[np.float64]

MIN_SIGMA_REL = 1e-4
"""A ten-thousandth of the run: narrower, and powers of the exponent leave the range of numbers."""
MAX_SIGMA_REL = 12**-0.5
"""The spread of the plain mean over the whole run (gamma 0), 0.28868."""


def check_sigma_rel(sigma_rel: float) -> float:
    """`sigma_rel` itself; ValueError when no increasing power profile has that spread."""
    if MIN_SIGMA_REL <= sigma_rel <= round(MAX_SIGMA_REL, 5):
        return sigma_rel
    if sigma_rel > MAX_SIGMA_REL:
        sentence = Text(
            "sigma_rel {given} has no average: at 0.28868 (1/sqrt(12)) every moment of the run "
            "already counts alike, and a wider spread would have to favour its beginning; choose "
            "0 < sigma_rel <= 0.28868 (0.05 follows the end, 0.25 is broad)",
            given=f"{sigma_rel:g}",
        )
        raise ValueError(sentence)
    raise ValueError(
        f"sigma_rel {sigma_rel:g}: must be above 0, at least {MIN_SIGMA_REL:g}, and at most "
        "0.28868; 0.2 is a good start"
    )


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Exponent of the profile whose relative spread is `sigma_rel` (Eq. 126, Algorithm 2)."""
    s = check_sigma_rel(sigma_rel) ** -2
    return max(0.0, float(np.roots([1, 7, 16 - s, 12 - s]).real.max()))


def sigma_rel_from_gamma(gamma: float) -> float:
    """Relative spread of the profile with exponent `gamma` (Eq. 123)."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def centre_of_mass(gamma: float) -> float:
    """Mean of the profile as a fraction of T (the first moment of Eq. 121)."""
    return (gamma + 1) / (gamma + 2)


def power_profile(time: Floats, end: float, gamma: float) -> Floats:
    """Density of the average over training time, zero after `end` (Eq. 121)."""
    inside = np.clip(time / end, 0.0, 1.0)
    return np.where(time <= end, (gamma + 1) / end * inside**gamma, 0.0)


def cumulative_profile(time: Floats, end: float, gamma: float) -> Floats:
    """Mass of the profile before `time`: the integral of Eq. 121, (time / end)^(gamma + 1)."""
    return (time / end) ** (gamma + 1)


def mean_cumulative_profile(start: Floats, stop: Floats, end: float, gamma: float) -> Floats:
    """Mean of `cumulative_profile` over each interval [start, stop], start < stop.

    Its integral is power(stop) - power(start) with exponent gamma + 2, here by log1p and expm1: the
    plain difference of two nearly equal powers loses the digits of a short interval.
    """
    length = (stop - start) / stop
    with np.errstate(divide="ignore"):  # an interval from 0: log 0 = -inf, and expm1 of that is -1
        share = -np.expm1((gamma + 2) * np.log1p(-length))
    return cumulative_profile(stop, end, gamma) * share / ((gamma + 2) * length)


def power_beta(gamma: float, step: float, interval: float) -> float:
    """Decay of the update at `step` that covers the last `interval` of training time (Eq. 127)."""
    return (1 - interval / step) ** (gamma + 1)


def inner_product(
    gamma_a: Floats | float, end_a: Floats | float, gamma_b: Floats | float, end_b: Floats | float
) -> Floats:
    """Inner product of two profiles that end at `end_a` and `end_b` (Eq. 151); broadcasts."""
    earlier = np.minimum(end_a, end_b)
    mass_a = (gamma_a + 1) / end_a * (earlier / end_a) ** gamma_a
    mass_b = (gamma_b + 1) / end_b * (earlier / end_b) ** gamma_b
    return mass_a * mass_b * earlier / (gamma_a + gamma_b + 1)
