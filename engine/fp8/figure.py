"""The error of every layer in one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..canvas import Pixels, new_figure, pixels_of
from .report import WORTH_EXEMPTING, Fp8Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = "#15181d"
INK = "#9aa3b2"
QUANTIZED = "#4c9be8"
WORSE = "#e8864c"
NAMED_LAYERS = 5


def draw_errors(report: Fp8Report) -> Pixels:
    """Relative RMS error of each measured layer, in model order."""
    figure = new_figure(9, 3.8, dpi=110, paper=PAPER, layout="constrained")
    axes = figure.add_subplot(facecolor=PAPER)
    if report.measured:
        _draw_layers(axes, report)
    summary = report.to_json()
    axes.set_title(
        f"{summary['quantized_layers']} layers in FP8, {summary['kept_layers']} kept;  "
        f"{_size(summary['bytes_before'])} → {_size(summary['bytes_after'])};  "
        f"median error {summary['median_relative_rms_percent'] or 0:.2f} %",
        color=INK,
        fontsize=10,
        loc="left",
    )
    axes.set_xlabel("quantised layer, in model order", color=INK)
    axes.set_ylabel("relative RMS error\nof the weights / %", color=INK)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    return pixels_of(figure)


def _draw_layers(axes: Axes, report: Fp8Report) -> None:
    percent = np.array([100 * layer.error for layer in report.measured])
    position = {layer.name: index for index, layer in enumerate(report.measured)}
    worse = [position[layer.name] for layer in report.worth_exempting()]
    limit = WORTH_EXEMPTING * float(np.median(percent))
    low, high = min(percent.min(), limit), max(percent.max(), limit)
    margin = max(high - low, 0.05 * high)
    axes.set_ylim(low - 0.35 * margin, high + 0.75 * margin)
    axes.scatter(range(len(percent)), percent, c=QUANTIZED, s=14, linewidths=0)
    axes.scatter(worse, percent[worse], c=WORSE, s=22, linewidths=0)
    axes.axhline(limit, color=WORSE, linewidth=0.9, linestyle="--")
    lines = [f"dashed: {WORTH_EXEMPTING:g} × median, worth keeping above it"]
    lines += [
        f"{percent[index]:.2f} %  {report.measured[index].name}" for index in worse[:NAMED_LAYERS]
    ]
    if len(worse) > NAMED_LAYERS:
        lines.append(f"and {len(worse) - NAMED_LAYERS} more, see the report")
    axes.text(
        0.5,
        0.98,
        "\n".join(lines),
        transform=axes.transAxes,
        ha="center",
        va="top",
        color=WORSE,
        fontsize=8,
        linespacing=1.35,
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
