"""Pictures of averages over training time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..canvas import Pixels, new_figure, pixels_of
from ..texts import Text
from .average import AveragePlan
from .profile import Floats, centre_of_mass, gamma_from_sigma_rel, power_profile
from .reconstruction import Reconstruction
from .schedule import requested_sigma_rel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES, DPI = (8.0, 4.5), 128  # 1024 x 576 pixels
BACKGROUND, INK, FAINT = "#1c1e24", "#e4e6eb", "#8b919e"
CURVE_POINTS = 200
WEIGHT, IDEAL, MARK = "#4cc2ff", "#ffb454", "#ff6b6b"
MOST_BARS = 1000
"""More checkpoints than a chart has pixels for share bars with their neighbours."""
MIN_LABEL_WIDTH = 0.045
"""Fraction of the axis that a bar must span for its percentage to fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """What is drawn of a plan: one bar for each checkpoint, or for several neighbours."""

    names: tuple[str, ...]
    """Name of the file, or of the first and the last."""
    steps: Floats
    """Training time of the (last) file, (B,)."""
    borders: Floats
    """Of the stretches of training time, (B + 1,)."""
    weights: Floats
    """What the files of the bar count together, (B,)."""


def bars_of(plan: AveragePlan, most: int = MOST_BARS) -> Bars:
    """The bars of a plan, at most so many; their areas are the weights whatever they hold."""
    name, times = plan.order.name, np.asarray(plan.order.times)
    edges = np.unique(np.linspace(0, len(times), min(len(times), most) + 1).astype(int))
    spans = list(zip(edges.tolist(), edges[1:].tolist(), strict=False))
    return Bars(
        names=tuple(
            name(start)
            if stop - start == 1
            else Text("{first} to {last}", first=name(start), last=name(stop - 1))
            for start, stop in spans
        ),
        steps=times[edges[1:] - 1],
        borders=cells(times, plan.order.windowed)[edges],
        weights=np.add.reduceat(plan.weights, edges[:-1]),
    )


def cells(times: Sequence[float] | Floats, windowed: bool) -> Floats:
    """Borders of the stretch of training time that each checkpoint stands for, (N + 1,)."""
    knots = np.asarray(times, dtype=np.float64)
    middles = (knots[:-1] + knots[1:]) / 2
    return np.concatenate([[knots[0] if windowed else 0.0], middles, [knots[-1]]])


def ideal_curve(plan: AveragePlan, points: int = CURVE_POINTS) -> tuple[Floats, Floats] | None:
    """(training time, density) of the profile that a plan asks for; None when it asks for none."""
    sigma_rel = requested_sigma_rel(plan.schedule)
    if sigma_rel is None:
        return None
    end = plan.order.times[-1]
    time = np.linspace(0, end, points)
    return time, power_profile(time, end, gamma_from_sigma_rel(sigma_rel))


def draw_weights(plan: AveragePlan) -> Pixels:
    """Weight of each checkpoint over training time, the ideal profile behind it.

    Bars are densities, so that their areas are the weights and compare with the profile.
    """
    figure, axes = _canvas()
    bars, times = bars_of(plan), np.asarray(plan.order.times)
    borders, weights = bars.borders, bars.weights
    widths = np.maximum(np.diff(borders), times[-1] * 1e-3)
    heights = weights / widths
    sigma_rel = requested_sigma_rel(plan.schedule)
    _draw_profile(axes, plan, float(heights.max()))
    axes.bar(
        borders[:-1],
        heights,
        widths,
        align="edge",
        color=WEIGHT,
        alpha=0.55,
        edgecolor=WEIGHT,
        label="weight of each checkpoint (area)",
    )
    _label_bars(axes, borders, heights, weights)
    axes.plot(
        times,
        np.zeros_like(times),
        "|",
        color=INK,
        markersize=12,
        clip_on=False,
        zorder=5,
        label="checkpoints",
    )
    report = plan.report()
    centre = report["centre_of_mass"] * times[-1]
    label = f"centre of mass, {report['centre_of_mass']:.3f} T"
    axes.axvline(centre, color=MARK, linestyle="--", linewidth=1.4, label=label)
    achieved = f"achieved sigma_rel {report['sigma_rel']:.3f}"
    asked = "" if sigma_rel is None else f", requested {sigma_rel:.3f}"
    axes.set_title(f"{len(times)} checkpoints, {achieved}{asked}", color=INK, loc="left")
    _finish(axes, plan.order.unit, times[-1], f"weight per {plan.order.unit.removesuffix('s')}")
    return pixels_of(figure)


def draw_reconstruction(reconstruction: Reconstruction) -> Pixels:
    """Requested profile, the one that the shadows give, and the shadows."""
    figure, axes = _canvas()
    end = float(reconstruction.end)
    time = np.linspace(0, end, CURVE_POINTS)
    wanted = power_profile(time, end, gamma_from_sigma_rel(reconstruction.sigma_rel))
    for index, stored in enumerate(reconstruction.stored):
        profile = power_profile(time, end, gamma_from_sigma_rel(stored))
        label = "stored shadows" if index == 0 else None
        axes.plot(time, profile, color=FAINT, linewidth=0.9, label=label)
    axes.fill_between(
        time, wanted, color=IDEAL, alpha=0.3, label=f"requested, {reconstruction.sigma_rel:g}"
    )
    axes.plot(time, reconstruction.profile(time), color=WEIGHT, linewidth=2, label="reconstructed")
    axes.set_ylim(0, 1.6 * max(float(wanted.max()), float(reconstruction.profile(time).max())))
    error = f"profile error {100 * reconstruction.profile_error:.2g} %"
    parts = "  ".join(
        f"{x:+.3f} x {stored:g}"
        for x, stored in zip(reconstruction.coefficients, reconstruction.stored, strict=True)
    )
    axes.set_title(
        f"sigma_rel {reconstruction.sigma_rel:g} from shadows, {error}\n{parts}",
        color=INK,
        loc="left",
        fontsize=10,
    )
    _finish(axes, "steps", end, "weight per step")
    return pixels_of(figure)


def _draw_profile(axes: Axes, plan: AveragePlan, tallest: float) -> None:
    curve, sigma_rel = ideal_curve(plan), requested_sigma_rel(plan.schedule)
    if curve is None or sigma_rel is None:
        return
    time, profile = curve
    axes.fill_between(time, profile, color=IDEAL, alpha=0.22, linewidth=0)
    axes.plot(time, profile, color=IDEAL, linewidth=1.6, label=f"ideal profile, {sigma_rel:g}")
    centre = centre_of_mass(gamma_from_sigma_rel(sigma_rel))
    label = f"its centre of mass, {centre:.3f} T"
    axes.axvline(centre * time[-1], color=IDEAL, linestyle=":", linewidth=1.4, label=label)
    axes.set_ylim(0, 1.18 * max(tallest, float(profile.max())))


def _label_bars(axes: Axes, borders: Floats, heights: Floats, weights: Floats) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground=BACKGROUND)]
    for left, right, height, weight in zip(borders, borders[1:], heights, weights, strict=False):
        if right - left < MIN_LABEL_WIDTH * borders[-1]:
            continue
        axes.annotate(
            f"{100 * weight:.1f} %",
            ((left + right) / 2, height),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=9,
            path_effects=halo,
            zorder=6,
        )


def _canvas() -> tuple[Figure, Axes]:
    figure = new_figure(*SIZE_INCHES, dpi=DPI, paper=BACKGROUND, layout="constrained")
    axes = figure.add_subplot(facecolor=BACKGROUND)
    return figure, axes


def _finish(axes: Axes, unit: str, end: float, density: str) -> None:
    axes.set_xlim(0, end * 1.01)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"training time ({unit}), T = {end:g}", color=INK)
    axes.set_ylabel(density, color=INK)
    axes.tick_params(colors=FAINT)
    axes.grid(axis="y", color=FAINT, alpha=0.18)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.figure.legend(
        loc="outside lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=9
    )
