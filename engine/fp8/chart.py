"""The error of every layer in one picture."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report import WORTH_EXEMPTING, Fp8Report

INK = "#8b93a1"  # readable on a dark and on a light background
QUANTIZED = "#4c9be8"
WORSE = "#e8864c"
NAMED_LAYERS = 4


def error_chart(report: Fp8Report) -> np.ndarray:
    """Relative RMS error of each measured layer, in model order: RGB uint8 [height, width, 3]."""
    figure = Figure(figsize=(9, 3.6), dpi=110, facecolor="#15181d", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="#15181d")
    worse = report.worth_exempting()
    names = {layer.name for layer in worse}
    percent = [100 * layer.relative_rms for layer in report.measured]
    colours = [WORSE if layer.name in names else QUANTIZED for layer in report.measured]
    axes.scatter(range(len(percent)), percent, c=colours, s=14, linewidths=0)
    if percent:
        limit = WORTH_EXEMPTING * float(np.median(percent))
        axes.axhline(limit, color=WORSE, linewidth=0.9, linestyle="--")
        axes.annotate(
            f"worth keeping: above {limit:.2f} %",
            (1, limit),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=WORSE,
            fontsize=8,
        )
        axes.set_ylim(0, 1.25 * max(*percent, limit))
    position = {layer.name: index for index, layer in enumerate(report.measured)}
    for rank, layer in enumerate(worse[:NAMED_LAYERS]):
        right = position[layer.name] > len(percent) / 2
        axes.annotate(
            layer.name,
            (position[layer.name], 100 * layer.relative_rms),
            xytext=(-6 if right else 6, 5 + 9 * (rank % 2)),
            textcoords="offset points",
            ha="right" if right else "left",
            color=WORSE,
            fontsize=7.5,
        )
    summary = report.to_json()
    axes.set_title(
        f"{summary['quantized_layers']} layers in FP8, {summary['kept_layers']} kept;  "
        f"{summary['bytes_before'] / 2**30:.2f} → {summary['bytes_after'] / 2**30:.2f} GiB;  "
        f"median error {summary['median_relative_rms_percent'] or 0:.2f} %",
        color=INK,
        fontsize=10,
        loc="left",
    )
    axes.set_xlabel("quantised layer, in model order", color=INK)
    axes.set_ylabel("relative RMS error of the weights / %", color=INK)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
