"""Pictures of a calibration and of a schedule, readable on dark and light themes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..canvas import Pixels, new_figure, pixels_of
from .plan import MagCachePlan
from .schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BACKGROUND, PANEL, INK, FAINT = "#1e2127", "#262a32", "#d7dae0", "#4a505c"
COMPUTED, SKIPPED = "#5b8def", "#3a4150"
COLOURS = ("#5b8def", "#f0883e", "#57c7a5", "#d86fb5", "#c9b458")
DPI = 120


def _figure(width: float, height: float) -> Figure:
    return new_figure(width, height, dpi=DPI, paper=BACKGROUND, layout="constrained")


def _styled(axes: Axes) -> Axes:
    axes.set_facecolor(PANEL)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.grid(True, color=FAINT, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.title.set_color(INK)
    return axes


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, facecolor=PANEL, edgecolor=FAINT, labelcolor=INK, loc="best")


def draw_calibration(plan: MagCachePlan) -> Pixels:
    """Ratio with its spread, and cosine distance, one curve per conditioning."""
    has_cosine = any(curve.cosine_distance for curve in plan.curves)
    figure = _figure(7.4, 5.4 if has_cosine else 3.4)
    rows = figure.subplots(2 if has_cosine else 1, 1, sharex=True, squeeze=False)[:, 0]
    ratios = _styled(rows[0])
    ratios.set_title(plan.name, fontsize=10)
    ratios.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
    for curve, look in zip(plan.curves, _looks(len(plan.curves)), strict=True):
        steps = np.arange(len(curve.ratios))
        values = np.asarray(curve.ratios)
        ratios.plot(steps, values, label=curve.label, **look)
        if curve.spread:
            spread = np.asarray(curve.spread)
            ratios.fill_between(
                steps,
                values - spread,
                values + spread,
                color=look["color"],
                alpha=0.15,
                linewidth=0,
            )
    band = "\n(band: spread over tokens)" if any(curve.spread for curve in plan.curves) else ""
    ratios.set_ylabel(f"magnitude ratio to the step before{band}", fontsize=8)
    _legend(ratios)
    if has_cosine:
        _cosine_panel(_styled(rows[1]), plan)
    rows[-1].set_xlabel("sampling step", fontsize=9)
    _sigma_axis(ratios, plan.conditions.sigmas)
    return pixels_of(figure)


def _cosine_panel(axes: Axes, plan: MagCachePlan) -> None:
    for curve, look in zip(plan.curves, _looks(len(plan.curves)), strict=True):
        distances = np.asarray(curve.cosine_distance[1:])
        steps = np.arange(1, len(distances) + 1)
        axes.plot(steps, np.maximum(distances, 1e-7), label=curve.label, **look)
    axes.set_yscale("log")
    axes.set_ylabel("cosine distance\nto the step before", fontsize=8)


def _sigma_axis(axes: Axes, sigmas: Sequence[float]) -> None:
    """A second axis on top with the noise level at some of the steps."""
    if not sigmas:
        return
    top = axes.secondary_xaxis("top")
    steps = np.unique(np.linspace(0, len(sigmas) - 2, 6).round().astype(int))
    top.set_xticks(steps, [f"{sigmas[step]:.2f}" for step in steps])
    top.tick_params(colors=INK, labelsize=7)
    top.set_xlabel("noise level σ", fontsize=8, color=INK)
    axes.set_title(axes.get_title(), fontsize=10, color=INK, pad=10)


def _looks(count: int) -> list[dict[str, Any]]:
    """Line styles; later curves are thinner and dashed, so that equal curves stay visible."""
    return [
        {
            "color": COLOURS[index % len(COLOURS)],
            "linewidth": max(2.6 - 0.9 * index, 1.0),
            "linestyle": "-" if index == 0 else "--",
            "marker": "o",
            "markersize": 3,
        }
        for index in range(count)
    ]


def draw_schedule(schedule: Schedule, title: str) -> Pixels:
    """A strip of computed and skipped steps over the error gathered on them."""
    figure = _figure(7.4, 3.6)
    strip, errors = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    _draw_strip(strip, schedule)
    strip.set_title(
        f"{title}: {schedule.computed} of {schedule.steps} steps computed, "
        f"{schedule.speedup:.2f}× fewer evaluations",
        fontsize=10,
        color=INK,
    )
    _styled(errors)
    steps = np.arange(schedule.steps)
    errors.bar(steps, schedule.accumulated, width=0.86, color=COLOURS[1])
    errors.set_ylabel(_error_label(schedule), fontsize=8)
    errors.set_xlabel("sampling step", fontsize=9)
    errors.set_xlim(-0.6, schedule.steps - 0.4)
    if not schedule.skipped:
        errors.set_ylim(0, 1)
        errors.text(0.5, 0.5, "no step is skipped", transform=errors.transAxes, color=INK,
                    ha="center", va="center")  # fmt: skip
    return pixels_of(figure)


def _error_label(schedule: Schedule) -> str:
    if schedule.planned:
        return "predicted error since the\nlast computed step (latent RMS)"
    return "accumulated |1 − ratio| since\nthe last computed step"


def _draw_strip(axes: Axes, schedule: Schedule) -> None:
    skipped = set(schedule.skipped)
    axes.set_facecolor(BACKGROUND)
    for is_skipped, colour, label in ((False, COMPUTED, "computed"), (True, SKIPPED, "skipped")):
        steps = [step for step in range(schedule.steps) if (step in skipped) == is_skipped]
        axes.bar(steps, [1.0] * len(steps), width=0.86, color=colour, label=label,
                 edgecolor=FAINT, linewidth=0.5)  # fmt: skip
    axes.set_yticks([])
    axes.tick_params(bottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(fontsize=8, facecolor=PANEL, edgecolor=FAINT, labelcolor=INK, ncols=2,
                loc="lower center", bbox_to_anchor=(0.5, -0.55))  # fmt: skip
