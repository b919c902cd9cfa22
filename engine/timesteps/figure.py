"""The timestep preview as a picture: what is drawn, how it is weighed, what a run made of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..canvas import Pixels, new_figure, pixels_of
from ..texts import Text
from .preview import DrawnRun, Preview

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, FAINT = "#fbfbfd", "#23283a", "#8a90a2"
BARS, DENSITY, WEIGHTED, RUN = "#a9c4ee", "#1f4fa3", "#d9730d", "#0b8a6a"
LOG_SNR_TICKS = (8, 6, 4, 2, 0, -2, -4, -6, -8)
LOG_WEIGHT_FROM = 20.0
"""Ratio of loss weights above which their axis is logarithmic."""


def draw_preview(preview: Preview, run: DrawnRun | None = None) -> Pixels:
    """What is drawn and how it is weighed, and beside it what a run made of it."""
    figure = new_figure(10.24, 8.2 if run else 6.4, dpi=125, paper=PAPER)
    _draw(figure, preview, run)
    return pixels_of(figure)


def _draw(figure: Figure, preview: Preview, run: DrawnRun | None) -> None:
    heights = [3.0, 1.1, 1.3] if run else [3.0, 1.0]
    axes = figure.subplots(
        len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights, "hspace": 0.14}
    )
    inch = 1.0 / figure.get_figheight()
    figure.subplots_adjust(left=0.085, right=0.975, top=1.0 - 1.09 * inch, bottom=0.55 * inch)
    for axis in axes:
        _style(axis)
        _shade_outside(axis, preview)
    _draw_distribution(axes[0], preview, run)
    _draw_weight(axes[1], preview)
    if run:
        _draw_run_loss(axes[2], preview, run)
    axes[-1].set_xlabel("noise level t   (0 = clean, 1 = pure noise;  timestep = 1000 t)")
    axes[-1].set_xlim(0.0, 1.0)
    _add_log_snr(axes[0])
    _add_title(figure, preview)


def _style(axis: Axes) -> None:
    axis.set_facecolor(PAPER)
    axis.tick_params(colors=INK, labelsize=9)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    axis.grid(True, color="#e4e7ef", linewidth=0.8)
    axis.set_axisbelow(True)
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(FAINT)


def _shade_outside(axis: Axes, preview: Preview) -> None:
    sampling = preview.settings.sampling
    for start, end in ((0.0, sampling.low), (sampling.high, 1.0)):
        if end > start:
            axis.axvspan(start, end, facecolor="#eceef4", edgecolor="none", zorder=0)


def _draw_distribution(axis: Axes, preview: Preview, run: DrawnRun | None) -> None:
    edges, width = preview.edges.numpy(), 1.0 / preview.settings.bins
    drawn = preview.counts.numpy() / preview.counts.sum().item() / width
    tallest = drawn.max()
    if run is None:
        label = f"drawn: one epoch of {preview.settings.samples:,} items"
        axis.stairs(drawn, edges, fill=True, color=BARS, label=label)
    else:
        tallest = max(tallest, _draw_run_counts(axis, preview, run))
    t, density = preview.t.numpy(), preview.density.numpy()
    axis.plot(t, density, color=DENSITY, linewidth=2.0, label="density")
    if preview.settings.sampling.loss_weight(preview.t).std() > 0:
        effective = preview.effective.numpy()
        label = "density × loss weight (area 1)"
        axis.plot(t, effective, color=WEIGHTED, linewidth=2.0, linestyle=(0, (5, 2)), label=label)
    axis.set_ylim(0.0, 1.12 * max(tallest, min(density.max(), 1.6 * tallest)))
    axis.set_ylabel("probability per unit of t")
    legend = axis.legend(frameon=True, facecolor=PAPER, edgecolor="none", fontsize=9)
    for text in legend.get_texts():
        text.set_color(INK)


def _draw_run_counts(axis: Axes, preview: Preview, run: DrawnRun) -> float:
    """The run's share of each bin over the band that counting alone explains (2 sigma); returns
    the height of both."""
    edges, scale = preview.edges.numpy(), preview.settings.bins
    total, expected = run.counts.sum().item(), preview.expected.numpy()
    noise = 2.0 * np.sqrt(expected * (1.0 - expected) / total)
    band = (expected + noise) * scale, np.maximum(expected - noise, 0.0) * scale
    label = "plan ± 2 σ of independent draws"
    axis.stairs(band[0], edges, baseline=band[1], fill=True, color=BARS, label=label)
    label = f"drawn by the run: {total:,} samples"
    drawn = run.counts.numpy() / total * scale
    axis.stairs(drawn, edges, color=RUN, linewidth=2.0, label=label)
    return max(band[0].max(), drawn.max())


def _draw_weight(axis: Axes, preview: Preview) -> None:
    weight = preview.weight.numpy()
    axis.plot(preview.t.numpy(), weight, color=WEIGHTED, linewidth=2.0)
    if weight.max() > LOG_WEIGHT_FROM * weight.min():
        axis.set_yscale("log")
    else:
        axis.set_ylim(0.0, 1.25 * weight.max())
    axis.set_ylabel("loss weight")


def _draw_run_loss(axis: Axes, preview: Preview, run: DrawnRun) -> None:
    centres = (0.5 * (preview.edges[1:] + preview.edges[:-1])).numpy()
    axis.errorbar(
        centres,
        run.loss.numpy(),
        yerr=run.loss_error.nan_to_num(0.0).numpy(),
        fmt="o",
        markersize=4,
        color=RUN,
        ecolor=RUN,
        elinewidth=1.2,
        capsize=0,
    )
    axis.set_ylim(bottom=0.0)
    axis.set_ylabel("loss of the run\n(mean ± s.e.)")


def _add_log_snr(axis: Axes) -> None:
    """log-SNR = 2 ln((1 - t) / t), as a second axis on top."""
    top = axis.secondary_xaxis("top")
    top.set_ticks([1.0 / (1.0 + np.exp(0.5 * snr)) for snr in LOG_SNR_TICKS])
    top.set_xticklabels([f"{snr:+d}".replace("-", "−") if snr else "0" for snr in LOG_SNR_TICKS])
    top.tick_params(colors=INK, labelsize=9)
    top.spines["top"].set_color(FAINT)
    top.set_xlabel("log-SNR   2 ln((1 − t) / t)", color=INK, fontsize=9)


def _add_title(figure: Figure, preview: Preview) -> None:
    inch = 1.0 / figure.get_figheight()
    high, low = 1.0 - 0.28 * inch, 1.0 - 0.51 * inch
    name, details = ", ".join(title(preview)), " · ".join(subtitle(preview))
    figure.text(0.085, high, name, va="center", color=INK, fontsize=14, fontweight="bold")
    figure.text(0.085, low, details, va="center", color=FAINT, fontsize=9.5)


def title(preview: Preview) -> list[str]:
    """Mode, what shapes it, and the size of image it is for, one part each."""
    settings, sampling = preview.settings, preview.settings.sampling
    name = sampling.mode
    if sampling.mode == "shift":
        name += f" {sampling.discrete_flow_shift:g}"
    if sampling.weighting_scheme != "none":
        name += f" / {sampling.weighting_scheme}"
    parts = [name]
    ends = {"low": sampling.min_timestep, "high": sampling.max_timestep}
    if (sampling.min_timestep, sampling.max_timestep) != (0, 1000):
        cut = sampling.preserve_distribution_shape
        squeezed = Text("squeezed into {low}–{high}", **ends)
        parts.append(Text("cut to {low}–{high}", **ends) if cut else squeezed)
    if sampling.depends_on_resolution:
        parts.append(f"{settings.width} × {settings.height} px")
    return parts


def subtitle(preview: Preview) -> list[str]:
    """The statistics a reader compares first, one part each."""
    numbers: dict[str, Any] = preview.statistics
    places, deciles = _places(numbers["std"]), numbers["deciles"]
    low, high = f"{deciles[0]:.{places}f}", f"{deciles[8]:.{places}f}"
    parts: list[str] = [
        Text("mean {mean}", mean=f"{numbers['mean']:.{places}f}"),
        Text("std {std}", std=f"{numbers['std']:.{places}f}"),
        Text("80 % of draws in {low}–{high}", low=low, high=high),
    ]
    if numbers["acceptance_rate"] < 1.0:
        share = f"{100 * numbers['acceptance_rate']:.3g}"
        parts.append(Text("{share} % of the shape kept", share=share))
    buckets = preview.settings.sampling.num_timestep_buckets
    return [*parts, Text("{count} buckets", count=buckets)] if buckets >= 2 else parts


def _places(std: float) -> int:
    """Decimal places that show a spread with two digits, at least 3."""
    return 3 if std <= 0.0 else min(max(3, 2 - math.ceil(math.log10(std) + 1e-9)), 8)
