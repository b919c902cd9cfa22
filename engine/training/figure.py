"""The live picture of a run: loss against steps, with validation and what comes next."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..canvas import new_figure, pixels_of
from .history import LossHistory, StepRecord, ValidationRecord

INK, GRID, PAPER = "#d8dce6", "#3a4050", "#1c1f27"
LOSS, SMOOTH, HELD_OUT = "#5b6b8c", "#6fb3ff", "#ffb454"
SMOOTHING_SHARE = 0.05  # of the steps so far, the width of the smoothed line


def draw_history(
    history: LossHistory, *, steps: int, sample: np.ndarray | None = None, caption: str = ""
) -> Image.Image:
    """The loss curve of a run as a picture, the last sample (H, W, 3) in [0, 1] beside it."""
    figure = new_figure(6.4 if sample is None else 9.6, 3.6, dpi=100, paper=PAPER)
    if sample is None:
        axes = figure.add_axes((0.11, 0.15, 0.86, 0.74))
    else:
        axes = figure.add_axes((0.075, 0.15, 0.57, 0.74))
        beside = figure.add_axes((0.67, 0.05, 0.31, 0.84))
        beside.imshow(sample, interpolation="nearest")
        beside.set_axis_off()
        beside.set_title("last sample", color=INK, fontsize=9)
    _draw_losses(axes, history, steps)
    axes.set_title(caption, color=INK, fontsize=9, loc="left")
    return Image.fromarray(pixels_of(figure))


def draw_loss_map(loss_map: Mapping[str, Any]) -> Image.Image:
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


def _draw_losses(axes, history: LossHistory, steps: int) -> None:
    axes.set_facecolor(PAPER)
    numbers = [record.step for record in history.records]
    losses = history.losses
    axes.plot(numbers, losses, color=LOSS, linewidth=0.8, label="loss of each step")
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
    axes.set_xlabel("optimizer steps", color=INK, fontsize=9)
    axes.set_ylabel("loss", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8, which="both")
    axes.grid(color=GRID, linewidth=0.5)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    if losses:
        axes.legend(fontsize=8, facecolor=PAPER, edgecolor=GRID, labelcolor=INK)


def smoothed(losses: Sequence[float], share: float = SMOOTHING_SHARE) -> np.ndarray:
    """Centred running mean over `share` of the curve, narrower at both ends."""
    values = np.asarray(losses, dtype=np.float64)
    half = max(1, int(len(values) * share / 2))
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
