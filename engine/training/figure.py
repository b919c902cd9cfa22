"""The live picture of a run: loss against steps, with validation and what comes next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..canvas import Pixels, new_figure, pixels_of
from .history import LossHistory, StepRecord, ValidationRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID, PAPER = "#d8dce6", "#3a4050", "#1c1f27"
LOSS, SMOOTH, HELD_OUT = "#5b6b8c", "#6fb3ff", "#ffb454"
SMOOTHING_SHARE = 0.05  # of the steps so far, the width of the smoothed line
TEXT, TICKS = 12, 11
"""Points. A node shows the picture at about two thirds of its size."""


def draw_history(
    history: LossHistory,
    *,
    steps: int,
    sample: NDArray[np.float32] | None = None,
    caption: str = "",
) -> Pixels:
    """The loss curve of a run, the last sample (H, W, 3) in [0, 1] beside it."""
    figure = new_figure(6.4 if sample is None else 9.6, 3.6, dpi=100, paper=PAPER)
    if sample is None:
        axes = figure.add_axes((0.13, 0.17, 0.82, 0.72))
    else:
        axes = figure.add_axes((0.087, 0.17, 0.545, 0.72))
        beside = figure.add_axes((0.675, 0.05, 0.31, 0.84))
        beside.imshow(sample, interpolation="nearest")
        beside.set_axis_off()
        beside.set_title("last sample", color=INK, fontsize=TEXT)
    _draw_losses(axes, history, steps)
    axes.set_title(caption, color=INK, fontsize=TEXT, loc="left")
    return pixels_of(figure)


def draw_loss_map(loss_map: Mapping[str, Any]) -> Pixels:
    """The finished run's LOSS_MAP as the same picture."""
    losses = loss_map["loss"]
    validations = zip(loss_map["validation_steps"], loss_map["validation_loss"], strict=True)
    history = LossHistory(
        [_bare_record(step, loss) for step, loss in enumerate(losses, start=1)],
        [ValidationRecord(step=step, loss=loss, bins=()) for step, loss in validations],
    )
    return draw_history(history, steps=len(losses), caption=f"{len(losses)} steps")


def _bare_record(step: int, loss: float) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        gradient_norm=math.nan,
        learning_rates=(),
        timesteps=(),
        sample_losses=(),
    )


def _draw_losses(axes: Axes, history: LossHistory, steps: int) -> None:
    axes.set_facecolor(PAPER)
    numbers = [record.step for record in history.records]
    losses = history.losses
    alone = "o" if len(losses) == 1 else None  # a line needs two points to be seen
    label = "loss of each step"
    axes.plot(numbers, losses, color=LOSS, linewidth=0.8, marker=alone, label=label)
    if len(losses) > 2:
        axes.plot(numbers, smoothed(losses), color=SMOOTH, linewidth=1.8, label="smoothed")
    if history.validations:
        axes.plot(
            [v.step for v in history.validations],
            [v.loss for v in history.validations],
            color=HELD_OUT,
            marker="o",
            markersize=3,
            linewidth=1.4,
            label="held-out items",
        )
    axes.set_xlim(0, steps)
    finite = [x for x in losses if math.isfinite(x)]
    if finite and max(finite) > 20 * max(min(finite), 1e-12):
        axes.set_yscale("log")
    axes.set_xlabel("optimizer steps", color=INK, fontsize=TEXT)
    axes.set_ylabel("loss", color=INK, fontsize=TEXT)
    axes.tick_params(colors=INK, labelsize=TICKS, which="both")
    axes.grid(color=GRID, linewidth=0.5)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    if losses:
        axes.legend(fontsize=TICKS, facecolor=PAPER, edgecolor=GRID, labelcolor=INK)


def smoothed(losses: Sequence[float], share: float = SMOOTHING_SHARE) -> NDArray[np.float64]:
    """Centred running mean over `share` of the curve, narrower at both ends."""
    values = np.asarray(losses, dtype=np.float64)
    half = max(1, int(len(values) * share / 2))
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
