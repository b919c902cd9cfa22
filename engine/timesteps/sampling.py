"""TimestepSampling: which noise levels a run trains on, in musubi-tuner's vocabulary.

t in [0, 1] is the noise level, x_t = (1 - t) * latent + t * noise, so t = 1 is pure noise in
every mode. The timestep given to the model is that same t (times 1000 where a model wants it).
"""

import functools
import math
from dataclasses import dataclass

from torch import Tensor

from ..refusals import refuse_not_finite, refuse_not_positive, refuse_other, refuse_outside
from ..texts import Text
from .distributions import (
    MODE_SCALE_MAX,
    MODE_SCALE_MIN,
    Distribution,
    LogitNormal,
    ModeDistribution,
    Squeezed,
    Uniform,
    mixture,
    truncated,
)
from .weighting import LOSS_WEIGHTS

WEIGHTING_SCHEMES = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")
LOGSNR2_MEAN, LOGSNR2_STD = 5.36, 1.0
"""The low-noise distribution of the qinglong mixtures, in log-SNR (musubi-tuner PR 407)."""
IDEOGRAM4_STD = 1.5
"""Std of logit(t) in Ideogram 4's schedule."""
PACKED_CELL = 16
"""Pixels along the edge of a cell of a packed latent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolutionShift:
    """ln(shift) as a line in the number of image tokens."""

    tokens: tuple[int, int]
    """Token counts of the two anchor resolutions."""
    mu: tuple[float, float]
    """ln(shift) at them; the line goes on beyond."""
    cells_per_token: int
    """Edge of a token in latent cells: 2, or 1 where the latent is already packed."""

    def log_shift(self, height: int, width: int) -> float:
        """ln(shift) for a latent of height x width cells."""
        tokens = (height // self.cells_per_token) * (width // self.cells_per_token)
        slope = (self.mu[1] - self.mu[0]) / (self.tokens[1] - self.tokens[0])
        return self.mu[0] + slope * (tokens - self.tokens[0])


RESOLUTION_SHIFTS = {
    "flux_shift": ResolutionShift(tokens=(256, 4096), mu=(0.5, 1.15), cells_per_token=2),
    "flux2_shift": ResolutionShift(tokens=(256, 4096), mu=(0.5, 1.15), cells_per_token=1),
    "qwen_shift": ResolutionShift(tokens=(256, 8192), mu=(0.5, 0.9), cells_per_token=2),
    "krea2_shift": ResolutionShift(tokens=(256, 6400), mu=(0.5, 1.15), cells_per_token=2),
}
QINGLONG = {"qinglong_flux": "flux_shift", "qinglong_qwen": "qwen_shift"}
"""Hybrid mode -> the resolution shift of its middle distribution."""
MODES = (
    "sigma",
    "uniform",
    "sigmoid",
    "shift",
    *("flux_shift", "qwen_shift", "flux2_shift", "krea2_shift", "ideogram4_shift"),
    "logsnr",
    *QINGLONG,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepSampling:
    """The settings of one run, under musubi-tuner's option names.

    The default is musubi's: every noise level alike and no loss weight. It assumes nothing about
    the model, so a shift that suits one architecture never trains another by accident.
    """

    mode: str = "sigma"
    """One of MODES (musubi: timestep_sampling)."""
    weighting_scheme: str = "none"
    """logit_normal and mode shape what mode sigma draws; cosmap and sigma_sqrt weigh the loss."""
    discrete_flow_shift: float = 1.0
    """Of mode shift; above 1 trains more on high noise. Above 0."""
    sigmoid_scale: float = 1.0
    """Std of logit(t) in the sigmoid and shift modes. Above 0."""
    logit_mean: float = 0.0
    """Mean log-SNR of logsnr and qinglong; minus the mean of logit(t) in sigma/logit_normal."""
    logit_std: float = 1.0
    """Std beside logit_mean. Above 0."""
    mode_scale: float = 1.29
    """s of sigma/mode, -1 to 1.75."""
    mid_ratio: float = 0.80
    """qinglong: share of the resolution-shift distribution; the three shares are relative."""
    logsnr_ratio: float = 0.075
    """qinglong: share of the log-SNR distribution (logit_mean, logit_std)."""
    logsnr2_ratio: float = 0.125
    """qinglong: share of the low-noise distribution, log-SNR ~ N(5.36, 1)."""
    min_timestep: int = 0
    """Low end of t, times 1000 (0 = clean)."""
    max_timestep: int = 1000
    """High end of t, times 1000 (1000 = pure noise)."""
    preserve_distribution_shape: bool = False
    """False: the shape is squeezed into the range. True: it is cut off at the range's ends."""
    num_timestep_buckets: int = 0
    """Equal intervals that every epoch visits equally often; 0 or 1 = independent draws."""

    def __post_init__(self) -> None:
        refuse_other("timestep_sampling", self.mode, MODES)
        refuse_other("weighting_scheme", self.weighting_scheme, WEIGHTING_SCHEMES)
        for name in ("discrete_flow_shift", "sigmoid_scale", "logit_std"):
            refuse_not_positive(name, getattr(self, name))
        refuse_not_finite("logit_mean", self.logit_mean)
        hint = "elsewhere the mode distribution is not monotone"
        refuse_outside("mode_scale", self.mode_scale, MODE_SCALE_MIN, MODE_SCALE_MAX, hint)
        self._check_shares()
        self._check_range()

    def _check_shares(self) -> None:
        shares = (self.mid_ratio, self.logsnr_ratio, self.logsnr2_ratio)
        if not (all(0.0 <= share < math.inf for share in shares) and sum(shares) > 0.0):
            raise ValueError(
                f"mid_ratio, logsnr_ratio, logsnr2_ratio are {shares}; "
                "each must be 0 or more, and at least one above 0"
            )

    def _check_range(self) -> None:
        if not 0 <= self.min_timestep < self.max_timestep <= 1000:
            sentence = Text(
                "min_timestep is {low} and max_timestep is {high}; they must satisfy 0 <= min < "
                "max <= 1000 (0 = clean, 1000 = pure noise)",
                low=self.min_timestep,
                high=self.max_timestep,
            )
            raise ValueError(sentence)
        if self.num_timestep_buckets < 0:
            raise ValueError(
                f"num_timestep_buckets is {self.num_timestep_buckets}; "
                "it must be 0 or 1 (off) or the number of intervals"
            )
        if not self.depends_on_resolution:
            self.distribution(1, 1)

    @property
    def depends_on_resolution(self) -> bool:
        """Whether the size of the latent enters the distribution."""
        return self.mode.endswith("_shift") or self.mode in QINGLONG

    @property
    def pixels_per_cell(self) -> int:
        """Pixels along the edge of a latent cell: 16 for FLUX.2 and Ideogram 4, whose latents are
        packed, else 8."""
        return PACKED_CELL if self.mode in ("flux2_shift", "ideogram4_shift") else 8

    @property
    def low(self) -> float:
        """Smallest t."""
        return self.min_timestep / 1000

    @property
    def high(self) -> float:
        """Largest t."""
        return self.max_timestep / 1000

    def distribution(self, height: int, width: int) -> Distribution:
        """The distribution of t for a latent of height x width cells (rows and columns of the
        model's own latent tensor; frames do not enter). ValueError when the range holds none of
        it."""
        return _distribution(self, height, width)

    def acceptance_rate(self, height: int, width: int) -> float:
        """Share of the unrestricted distribution that the range keeps (1 when it is squeezed)."""
        if not self.preserve_distribution_shape:
            return 1.0
        return _unrestricted(self, height, width).mass(self.low, self.high)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight of each sample's loss at its own noise level t; same shape as t."""
        return LOSS_WEIGHTS.get(self.weighting_scheme, LOSS_WEIGHTS["none"])(t)


@functools.lru_cache(maxsize=256)
def _distribution(sampling: TimestepSampling, height: int, width: int) -> Distribution:
    distribution = _unrestricted(sampling, height, width)
    if (sampling.min_timestep, sampling.max_timestep) == (0, 1000):
        return distribution
    restrict = truncated if sampling.preserve_distribution_shape else Squeezed
    return restrict(distribution, sampling.low, sampling.high)


def _unrestricted(sampling: TimestepSampling, height: int, width: int) -> Distribution:
    """The distribution on [0, 1]."""
    match sampling.mode:
        case "sigma":
            return _sigma(sampling)
        case "uniform":
            return Uniform()
        case "sigmoid":
            return LogitNormal(0.0, sampling.sigmoid_scale)
        case "shift":
            return LogitNormal(math.log(sampling.discrete_flow_shift), sampling.sigmoid_scale)
        case "logsnr":
            return _logsnr(sampling.logit_mean, sampling.logit_std)
        case "ideogram4_shift":
            return _ideogram4(height, width)
        case "qinglong_flux" | "qinglong_qwen":
            return _qinglong(sampling, height, width)
    mean = RESOLUTION_SHIFTS[sampling.mode].log_shift(height, width)
    return LogitNormal(mean, sampling.sigmoid_scale)


def _sigma(sampling: TimestepSampling) -> Distribution:
    """musubi indexes a table that runs from noise to clean, hence the minus of logit_normal."""
    match sampling.weighting_scheme:
        case "logit_normal":
            return LogitNormal(-sampling.logit_mean, sampling.logit_std)
        case "mode":
            return ModeDistribution(sampling.mode_scale)
    return Uniform()


def _logsnr(mean: float, std: float) -> LogitNormal:
    """log-SNR = 2 ln((1 - t) / t) ~ N(mean, std^2) (arXiv:2411.14793)."""
    return LogitNormal(-0.5 * mean, 0.5 * std)


def _ideogram4(height: int, width: int) -> LogitNormal:
    """Ideogram 4's own schedule: its mean is 0 at 512 x 512 pixels and grows with their number."""
    pixels = height * width * PACKED_CELL**2
    return LogitNormal(0.5 * math.log(pixels / 512**2), IDEOGRAM4_STD)


def _qinglong(sampling: TimestepSampling, height: int, width: int) -> Distribution:
    middle = RESOLUTION_SHIFTS[QINGLONG[sampling.mode]].log_shift(height, width)
    return mixture(
        (sampling.mid_ratio, sampling.logsnr_ratio, sampling.logsnr2_ratio),
        (
            LogitNormal(middle, sampling.sigmoid_scale),
            _logsnr(sampling.logit_mean, sampling.logit_std),
            _logsnr(LOGSNR2_MEAN, LOGSNR2_STD),
        ),
    )
