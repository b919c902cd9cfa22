"""The numbers of the timestep preview; node, live chart and figure all show this one object.

The bins hold an actual draw through TimestepStream, the trainer's own call path.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sampling import TimestepSampling
from .stream import TimestepStream

MAX_PIXELS, MAX_BINS, MAX_SAMPLES = 16_384, 1_000, 5_000_000
"""Of an edge, of the figure, and of an epoch: as many as take seconds and less than 1 GB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewSettings:
    """What is drawn, and for which training image."""

    sampling: TimestepSampling
    """The distribution that is shown."""
    width: int = 1024
    """Width of a training image in pixels."""
    height: int = 1024
    """Height of a training image in pixels."""
    bins: int = 50
    """Equal bins of t over [0, 1]."""
    samples: int = 100_000
    """Items of one epoch that are drawn."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        for name, most in (
            ("width", MAX_PIXELS),
            ("height", MAX_PIXELS),
            ("bins", MAX_BINS),
            ("samples", MAX_SAMPLES),
        ):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be 1 or more, at most {most}"
                )

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of the image's latent."""
        size = self.sampling.pixels_per_cell
        return max(1, self.height // size), max(1, self.width // size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """Curves over t (1 = pure noise), bins of a draw, and its statistics."""

    settings: PreviewSettings
    t: Tensor
    """Where the curves are sampled, float64 (P,), from 0 to 1."""
    density: Tensor
    """Probability density of t, (P,)."""
    weight: Tensor
    """Loss weight at t, (P,)."""
    effective: Tensor
    """density * weight scaled to area 1: where the loss looks, (P,)."""
    edges: Tensor
    """Edges of the bins, (bins + 1,)."""
    counts: Tensor
    """Drawn t in each bin, int64 (bins,)."""
    expected: Tensor
    """Probability of each bin, (bins,)."""
    statistics: dict[str, Any]
    """mean, std, min, max, deciles, acceptance_rate, bins (edges), counts, and what was drawn."""


def measure_preview(settings: PreviewSettings) -> Preview:
    """Draw one epoch as a run would and measure it; ValueError as the run would raise it."""
    sampling = settings.sampling
    distribution = sampling.distribution(*settings.cells)
    stream = TimestepStream(sampling, settings.samples, settings.seed)
    drawn = stream.draw(np.arange(settings.samples), *settings.cells)
    t = _curve_points(sampling.low, sampling.high)
    density, weight = distribution.density(t), sampling.loss_weight(t)
    edges = torch.linspace(0.0, 1.0, settings.bins + 1, dtype=torch.float64)
    counts = count_in_bins(drawn, settings.bins)
    return Preview(
        settings=settings,
        t=t,
        density=density,
        weight=weight,
        effective=density * weight / _mean_weight(sampling, settings.cells),
        edges=edges,
        counts=counts,
        expected=distribution.cdf(edges).diff(),
        statistics=_statistics(settings, drawn, edges, counts),
    )


def count_in_bins(t: Tensor, bins: int) -> Tensor:
    """Counts of t in [0, 1] in equal bins; t = 1 belongs to the last. int64 (bins,)."""
    return torch.bincount(_bin_of(t, bins), minlength=bins)


def _bin_of(t: Tensor, bins: int) -> Tensor:
    return (t * bins).long().clamp(max=bins - 1)


def _curve_points(low: float, high: float) -> Tensor:
    """Even in t and even in log-SNR, so that a distribution that hugs an end is drawn whole; both
    sides of the range's ends, where the density jumps."""
    even = torch.linspace(0.0, 1.0, 161, dtype=torch.float64)
    tails = torch.sigmoid(torch.linspace(-8.0, 8.0, 97, dtype=torch.float64))
    jumps = torch.tensor([low, low - 1e-9, high, high + 1e-9], dtype=torch.float64).clamp(0.0, 1.0)
    return torch.cat([even, tails, jumps]).unique()


@functools.lru_cache(maxsize=64)
def _mean_weight(sampling: TimestepSampling, cells: tuple[int, int]) -> float:
    """E[weight(T)] by the midpoint rule in u."""
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    return sampling.loss_weight(sampling.distribution(*cells).from_uniform(u)).mean().item()


def _statistics(
    settings: PreviewSettings, drawn: Tensor, edges: Tensor, counts: Tensor
) -> dict[str, Any]:
    tenths = np.quantile(drawn.numpy(), np.linspace(0.0, 1.0, 11), method="inverted_cdf").tolist()
    return {
        "mean": drawn.mean().item(),
        "std": drawn.std(correction=0).item(),
        "min": tenths[0],
        "max": tenths[-1],
        "deciles": tenths[1:-1],
        "acceptance_rate": settings.sampling.acceptance_rate(*settings.cells),
        "bins": edges.tolist(),
        "counts": counts.tolist(),
        "samples": settings.samples,
        "seed": settings.seed,
        "width": settings.width,
        "height": settings.height,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnRun:
    """What a run drew and lost, in the bins of a preview."""

    counts: Tensor
    """Drawn timesteps in each bin, int64 (bins,)."""
    loss: Tensor
    """Mean loss of the samples of each bin, float64 (bins,); NaN where none fell."""
    loss_error: Tensor
    """Standard error of that mean, (bins,); NaN below two samples."""


def measure_run(
    timesteps: Sequence[float], timestep_losses: Sequence[float], bins: int
) -> DrawnRun:
    """Bin a run's noise levels t in [0, 1] and the loss of each sample, given in the same order."""
    if len(timesteps) == 0 or len(timesteps) != len(timestep_losses):
        raise ValueError(
            f"loss_map holds {len(timesteps)} timesteps and {len(timestep_losses)} losses of "
            "them; a run of Train LoRA (Braid) gives one loss for each drawn timestep"
        )
    t = torch.as_tensor(timesteps, dtype=torch.float64)
    loss = torch.as_tensor(timestep_losses, dtype=torch.float64)
    bin_of, counts = _bin_of(t, bins), count_in_bins(t, bins)
    mean = torch.bincount(bin_of, weights=loss, minlength=bins) / counts
    spread = torch.bincount(bin_of, weights=(loss - mean[bin_of]) ** 2, minlength=bins)
    error = torch.sqrt(spread / (counts - 1).clamp(min=0) / counts)
    return DrawnRun(counts=counts, loss=mean, loss_error=error)
