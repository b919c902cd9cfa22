"""What the training node shows of a run while it goes: its loss curve, and the last preview."""

import time
from dataclasses import dataclass

import numpy as np

from ...canvas import Pixels
from ...training.figure import draw_history
from ...training.loop import TrainingRun, TrainingStep
from .preview import Previewer

DRAWING_SHARE = 0.01
"""Largest share of the time that goes into drawing."""


@dataclass(slots=True)
class LivePicture:
    """Draws the picture of a run after a step, for `progress.reported`."""

    run: TrainingRun
    previewer: Previewer | None
    _shown: np.ndarray | None = None
    _next_at: float = 0.0
    _warm: bool = False

    def __call__(self, step: TrainingStep) -> Pixels | None:
        """None, to leave the shown one, where drawing would take too large a share of the time."""
        run, now = self.run, time.perf_counter()
        sample = self.previewer.last if self.previewer else None
        if now < self._next_at and sample is self._shown and step.step < run.plan.steps:
            return None
        self._shown = sample
        picture = draw_history(
            run.history,
            steps=run.plan.steps,
            sample=sample,
            caption=f"step {step.step} of {run.plan.steps} · average loss "
            f"{run.history.average(run.steps_per_epoch):.4g} · {run.seconds_per_step:.2f} s a step",
        )
        drawn = time.perf_counter()
        if self._warm:  # the first picture also loads matplotlib: its time says nothing
            self._next_at = drawn + (drawn - now) / DRAWING_SHARE
        self._warm = True
        return picture
