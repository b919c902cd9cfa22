"""Figures as pixels: each feature draws its own in its figure.py, by draw_... functions.

matplotlib is imported when the first one is drawn.

That import takes longer than all the rest of the pack, and writes matplotlib's list of the fonts
that it found into the user's cache folder: neither belongs into ComfyUI's start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]
"""RGB (H, W, 3)."""


def new_figure(width: float, height: float, *, dpi: int, paper: str, **options: Any) -> Figure:
    """An empty figure of width x height inches on a ground of that colour; not pyplot's."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, facecolor=paper, **options)


def as_image(pixels: Pixels) -> Tensor:
    """A picture as ComfyUI's IMAGE, float32 (1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(pixels).float().div_(255)[None]


def pixels_of(figure: Figure) -> Pixels:
    """The figure, drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
