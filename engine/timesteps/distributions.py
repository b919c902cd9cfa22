"""Distributions of the noise level t in [0, 1] (1 = pure noise): quantile, CDF and density.

Everything musubi-tuner can draw is uniform, the logit-normal or the mode distribution of SD3 (Esser
et al. 2024, arXiv:2403.03206, section 3.1) or a mixture of them, squeezed into a range or truncated
to it. All maths is vectorised float64.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_MASS = 1e-6
"""A range that holds less of a distribution than this cannot be trained on by truncation."""

MODE_SCALE_MIN = -1.0
MODE_SCALE_MAX = 1.75
"""SD3's mode distribution is monotone for -1 <= s <= 2 / (pi - 2) = 1.7519."""

_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
LARGEST_BELOW_ONE = 1.0 - 2.0**-53
_BISECTIONS = 54


class Distribution(ABC):
    """A distribution of t. Tensors are float64 of any shape and keep their shape."""

    @abstractmethod
    def from_uniform(self, u: Tensor) -> Tensor:
        """Map u in [0, 1] to t, so that uniform u gives t this distribution."""

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t)."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Probability density at t; 0 outside the support."""

    def mass(self, low: float, high: float) -> float:
        """P(low <= T <= high)."""
        below, upto = self.cdf(torch.tensor([low, high], dtype=torch.float64)).tolist()
        return upto - below


@dataclass(frozen=True, slots=True)
class Uniform(Distribution):
    """Every noise level alike."""

    def from_uniform(self, u: Tensor) -> Tensor:
        return u

    def cdf(self, t: Tensor) -> Tensor:
        return t.clamp(0.0, 1.0)

    def density(self, t: Tensor) -> Tensor:
        return ((t >= 0.0) & (t <= 1.0)).to(t.dtype)


@dataclass(frozen=True, slots=True)
class LogitNormal(Distribution):
    """logit(t) ~ N(mean, std^2); the log-SNR 2 ln((1 - t) / t) is then N(-2 mean, (2 std)^2)."""

    mean: float
    std: float

    def from_uniform(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(t.clamp(0.0, 1.0)) - self.mean) / self.std)

    def density(self, t: Tensor) -> Tensor:
        inside = t.clamp(torch.finfo(t.dtype).tiny, LARGEST_BELOW_ONE)
        z = (torch.logit(inside) - self.mean) / self.std
        density = _INV_SQRT_2PI * torch.exp(-0.5 * z * z) / (self.std * inside * (1.0 - inside))
        return torch.where((t < 0.0) | (t > 1.0), 0.0, density)


@dataclass(frozen=True, slots=True)
class ModeDistribution(Distribution):
    """SD3's mode distribution: t = u + s (cos^2(pi u / 2) - 1 + u); s > 0 favours the middle."""

    scale: float

    def from_uniform(self, u: Tensor) -> Tensor:
        return u + self.scale * (torch.cos(0.5 * math.pi * u) ** 2 - 1.0 + u)

    def cdf(self, t: Tensor) -> Tensor:
        """The inverse of a monotone map that has no closed inverse, by bisection to 2^-54."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            below = self.from_uniform(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(t >= 1.0, 1.0, torch.where(t <= 0.0, 0.0, 0.5 * (low + high)))

    def density(self, t: Tensor) -> Tensor:
        slope = 1.0 + self.scale - self.scale * 0.5 * math.pi * torch.sin(math.pi * self.cdf(t))
        return torch.where((t < 0.0) | (t > 1.0), 0.0, 1.0 / slope.clamp(min=1e-9))


@dataclass(frozen=True, slots=True)
class Mixture(Distribution):
    """Distributions by share. One u serves all: it is split at the shares' edges, so that evenly
    spread u keep both the shares and every part inside them evenly spread."""

    shares: tuple[float, ...]
    """Sum to 1, each above 0."""
    parts: tuple[Distribution, ...]

    def from_uniform(self, u: Tensor) -> Tensor:
        t, edge = torch.empty_like(u), 0.0
        for share, part in zip(self.shares, self.parts, strict=True):
            own = part.from_uniform(((u - edge) / share).clamp(0.0, 1.0))
            t = own if edge == 0.0 else torch.where(u >= edge, own, t)
            edge += share
        return t

    def cdf(self, t: Tensor) -> Tensor:
        parts = (s * part.cdf(t) for s, part in zip(self.shares, self.parts, strict=True))
        return sum(parts, torch.zeros_like(t))

    def density(self, t: Tensor) -> Tensor:
        parts = (s * part.density(t) for s, part in zip(self.shares, self.parts, strict=True))
        return sum(parts, torch.zeros_like(t))


@dataclass(frozen=True, slots=True)
class Squeezed(Distribution):
    """`whole` with its shape, scaled from [0, 1] into [low, high]."""

    whole: Distribution
    low: float
    high: float

    def from_uniform(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.whole.from_uniform(u)

    def _unsqueezed(self, t: Tensor) -> Tensor:
        return (t - self.low) / (self.high - self.low)

    def cdf(self, t: Tensor) -> Tensor:
        return self.whole.cdf(self._unsqueezed(t).clamp(0.0, 1.0))

    def density(self, t: Tensor) -> Tensor:
        inside = (t >= self.low) & (t <= self.high)
        squeezed = self.whole.density(self._unsqueezed(t).clamp(0.0, 1.0)) / (self.high - self.low)
        return torch.where(inside, squeezed, 0.0)


@dataclass(frozen=True, slots=True)
class Truncated(Distribution):
    """`whole` on condition of [low, high], exactly: u runs through the CDF interval."""

    whole: Distribution
    low: float
    high: float
    below: float
    """P(T < low) under `whole`."""
    inside: float
    """P(low <= T <= high) under `whole`."""

    def from_uniform(self, u: Tensor) -> Tensor:
        t = self.whole.from_uniform((self.below + self.inside * u).clamp(0.0, 1.0))
        return t.clamp(self.low, self.high)

    def cdf(self, t: Tensor) -> Tensor:
        return (self.whole.cdf(t.clamp(self.low, self.high)) - self.below) / self.inside

    def density(self, t: Tensor) -> Tensor:
        inside = (t >= self.low) & (t <= self.high)
        return torch.where(inside, self.whole.density(t) / self.inside, 0.0)


def mixture(shares: tuple[float, ...], parts: tuple[Distribution, ...]) -> Distribution:
    """The mixture by relative shares; a part without a share is left out."""
    total = sum(shares)
    kept = [(share / total, part) for share, part in zip(shares, parts, strict=True) if share > 0.0]
    if len(kept) == 1:
        return kept[0][1]
    return Mixture(tuple(share for share, _ in kept), tuple(part for _, part in kept))


def truncated(whole: Distribution, low: float, high: float) -> Distribution:
    """`whole` on condition of [low, high]; ValueError when (almost) nothing of it lies there.

    A truncated mixture is the mixture of its truncated parts, weighted by what is left of each.
    """
    mass = whole.mass(low, high)
    if mass < SMALLEST_MASS:
        raise ValueError(
            f"min_timestep {1000 * low:g} to max_timestep {1000 * high:g} holds {mass:.2g} of this "
            f"distribution, and preserve_distribution_shape needs at least {SMALLEST_MASS:g}: "
            "widen the range, choose a mode that reaches it, or turn the option off"
        )
    if isinstance(whole, Mixture):
        masses = [part.mass(low, high) for part in whole.parts]
        left = [
            (share * part_mass, _truncated(part, low, high, part_mass))
            for share, part, part_mass in zip(whole.shares, whole.parts, masses, strict=True)
            if share * part_mass > SMALLEST_MASS * mass
        ]
        return mixture(tuple(share for share, _ in left), tuple(part for _, part in left))
    return _truncated(whole, low, high, mass)


def _truncated(whole: Distribution, low: float, high: float, mass: float) -> Truncated:
    below = whole.cdf(torch.tensor(low, dtype=torch.float64)).item()
    return Truncated(whole, low, high, below, mass)
