"""The chain of options before Train LoRA: each node adds its own part."""

from typing import Any

from comfy_api.latest import io

from ...engine.training.options import TrainingOptions
from .. import sockets


def chained(options: TrainingOptions | None, **part: Any) -> io.NodeOutput:
    """The options so far, if any, and one more."""
    return io.NodeOutput((options or TrainingOptions()).adding(**part))


def options_input() -> io.Input:
    return sockets.TrainingOptions.Input(
        "options", optional=True, tooltip="Further options: connect another of these nodes."
    )


def options_output() -> io.Output:
    return sockets.TrainingOptions.Output("options", tooltip="For Train LoRA, or the next option.")
