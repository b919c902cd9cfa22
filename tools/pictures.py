"""Draws the pack's icon and banner: a part of `make pictures`.

A plait of three strands: each runs across as sin(t) and in height as sin(2t), a third of a turn
after the one before, so that every crossing is over, then under. Short pieces are painted from the
lowest to the highest, each with a dark rim that cuts it out of what lies below.
"""

import sys
from pathlib import Path

import numpy as np
from host.find import PACK
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import FancyBboxPatch

PICTURES = PACK / "web" / "docs" / "pictures"
STRANDS = ("#f0a63a", "#3f9fe0", "#e0557f")
GROUND, INK, FAINT = "#171d27", "#f5f2ea", "#aab4c4"
TURN = 2 * np.pi
PIECES = 120
"""Per turn of each strand."""
DPI = 100
MARGIN = 80
"""Pixels around a picture, cut off in the end: a line is cut at the canvas, square to itself."""


def braid(axes: Axes, start: float, end: float, thickness: float, upright: bool) -> None:
    """The plait from `start` to `end` (radians), `thickness` in points."""
    step = TURN / PIECES
    pieces = [
        (np.sin(2 * (t + shift)), t, shift, color)
        for shift, color in zip((0, TURN / 3, 2 * TURN / 3), STRANDS, strict=True)
        for t in np.arange(start, end, step)
    ]
    for order, (height, t, shift, color) in enumerate(sorted(pieces)):
        rim = np.linspace(t, t + step, 6)
        body = np.linspace(t - 0.8 * step, t + 1.8 * step, 10)
        shade = _shaded(color, 0.80 + 0.20 * height)
        _line(axes, rim, np.sin(rim + shift), upright, GROUND, 1.34 * thickness, order)
        _line(axes, body, np.sin(body + shift), upright, shade, thickness, order)
        for width, by in ((0.52, 1.06), (0.2, 1.22)):  # light along the middle
            light = _shaded(color, by + 0.10 * height)
            _line(axes, body, np.sin(body + shift), upright, light, width * thickness, order)


def _line(axes: Axes, along, across, upright: bool, color, width: float, order: int) -> None:
    x, y = (across, along) if upright else (along, across)
    axes.plot(x, y, color=color, linewidth=width, solid_capstyle="butt", zorder=2 + order)


def _shaded(color: str, by: float) -> tuple[float, ...]:
    """The colour, darker below 1 and mixed with white above it."""
    rgb = np.array(to_rgb(color))
    return tuple(rgb * by if by <= 1 else 1 - (1 - rgb) * (2 - by))


def _card(width: int, height: int, corner: float) -> tuple[Figure, FancyBboxPatch]:
    """A figure and on it, MARGIN pixels from each side, a dark card with round corners."""
    whole = (width + 2 * MARGIN, height + 2 * MARGIN)
    figure = Figure(figsize=(whole[0] / DPI, whole[1] / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-MARGIN, width + MARGIN), ylim=(-MARGIN, height + MARGIN))
    axes.axis("off")
    inner = (width - 2 * corner, height - 2 * corner)
    style = f"round,pad={corner}"
    card = FancyBboxPatch((corner, corner), *inner, boxstyle=style, fc=GROUND, linewidth=0)
    axes.add_patch(card)
    return figure, card


def _axes(figure: Figure, place: tuple[float, ...], **limits) -> Axes:
    """Axes at (left, bottom, width, height) pixels of the card, without ticks."""
    width, height = figure.get_size_inches() * DPI
    left, bottom, wide, high = place
    axes = figure.add_axes(
        ((left + MARGIN) / width, (bottom + MARGIN) / height, wide / width, high / height)
    )
    axes.set(**limits)
    axes.axis("off")
    return axes


def icon() -> Figure:
    """400 x 400 pixels, the registry's largest: the plait from top to bottom."""
    figure, card = _card(400, 400, 72)
    axes = _axes(figure, (0, 0, 400, 400), xlim=(-2.05, 2.05), ylim=(-0.2, 0.72 * TURN))
    braid(axes, -1.2, 0.9 * TURN, 46, upright=True)
    _clip(axes, card)
    return figure


def banner() -> Figure:
    """1344 x 576 pixels (21:9): the name, what it does, the plait below."""
    figure, card = _card(1344, 576, 40)
    text = {"transform": figure.axes[0].transData, "va": "center"}
    figure.text(84, 436, "Braid", color=INK, fontsize=82, fontweight="bold", **text)
    does = "LoRA training · post-hoc EMA · FP8 scaled weights · planned MagCache, in ComfyUI"
    figure.text(88, 326, does, color=FAINT, fontsize=21, **text)
    axes = _axes(figure, (0, 12, 1344, 265), xlim=(0, 3.1 * TURN), ylim=(-1.6, 1.6))
    braid(axes, -1.0, 3.25 * TURN, 34, upright=False)
    _clip(axes, card)
    return figure


def _clip(axes: Axes, card: FancyBboxPatch) -> None:
    for line in axes.lines:
        line.set_clip_path(card)


def save(figure: Figure, path: Path) -> None:
    """What lies on the card, without the margin."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    imsave(path, np.ascontiguousarray(pixels[MARGIN:-MARGIN, MARGIN:-MARGIN]))


def main(folder: Path = PICTURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("icon", icon()), ("banner", banner())):
        save(figure, folder / f"{name}.png")
        sys.stdout.write(f"{folder / name}.png\n")


if __name__ == "__main__":
    main()
