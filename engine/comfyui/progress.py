"""Shows any iterator of steps to the host: progress bar, preview picture, cancel button.

for step in reported(train(...), total=plan.steps, picture=lambda step: curve.draw()):
    losses.append(step.loss)
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import comfy.model_management
import comfy.utils
from PIL import Image

from ..canvas import Pixels

Step = TypeVar("Step")
Result = TypeVar("Result")


def reported(
    steps: Iterable[Step],
    total: int,
    picture: Callable[[Step], Pixels | None] | None = None,
    picture_every_s: float = 1.0,
) -> Iterator[Step]:
    """Yield every step, then show it as done; `total` is the number of steps expected.

    `picture` draws the node's preview from the last step (None: leave the shown one); it is asked
    at most every `picture_every_s` seconds, and after the last expected step.

    When the user cancels, `comfy.model_management.InterruptProcessingException` rises from the
    caller's `for` *after* the caller has seen every step that was done: catch it outside, save what
    was made, raise it again. `steps` is closed however the loop ends.
    """
    bar = comfy.utils.ProgressBar(total)
    drawn_at = -float("inf")
    try:
        comfy.model_management.throw_exception_if_processing_interrupted()
        for done, step in enumerate(steps, start=1):
            yield step
            preview = None
            now = time.monotonic()
            if picture and (done == total or now - drawn_at >= picture_every_s):
                preview = _preview(picture(step))
                drawn_at = now
            bar.update_absolute(done, max(done, total), preview)
            comfy.model_management.throw_exception_if_processing_interrupted()
    finally:
        if isinstance(steps, Generator):
            steps.close()


def completed(steps: Generator[tuple[int, int], None, Result]) -> Result:
    """Run steps of (done, total) to their end under the host's progress bar; returns their result.

    When the user cancels, `steps` is closed and InterruptProcessingException rises.
    """
    bar = comfy.utils.ProgressBar(1)
    try:
        while True:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(*next(steps))
    except StopIteration as end:
        return end.value
    finally:
        steps.close()


def _preview(pixels: Pixels | None) -> tuple[str, Image.Image, None] | None:
    """The form the host's progress hook takes: (format, image, no size limit)."""
    return None if pixels is None else ("PNG", Image.fromarray(pixels), None)
