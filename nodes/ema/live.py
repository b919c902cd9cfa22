"""The chart in Post-Hoc EMA: live, and as a run has it."""

from collections.abc import Sequence
from typing import Any

from ...engine.disk.folders import SearchEndedError
from ...engine.ema.average import AveragePlan, plan_average, plan_for_order
from ...engine.ema.figure import bars_of, ideal_curve
from ...engine.ema.order import planned_order, selected
from ...engine.ema.schedule import Schedule
from ...engine.texts import Text
from ...engine.training.options import Checkpointing
from ..live_node import DecidedByTheRunError, LiveNode
from ..training.checkpoints import live_checkpoints, live_search
from .fields import parse_schedule

EXAMPLE_COUNT = 10
"""Checkpoints that the live chart shows while no run is known."""
AS_PLANNED = Text("as the linked run will save them")
EXAMPLE = Text("an example: no run is linked yet")
"""What the chart says of files that do not exist yet."""


def chart_json(plan: AveragePlan) -> dict[str, Any]:
    """What web/ema/chart.js draws; numbers and names only. `count` checkpoints, in at most so many
    bars as a chart has room for: `files`, `steps` and `weights` are those of the bars."""
    curve, bars = ideal_curve(plan), bars_of(plan)
    return plan.summary() | {
        "count": len(plan.order.files),
        "files": list(bars.names),
        "steps": bars.steps.tolist(),
        "weights": bars.weights.tolist(),
        "borders": bars.borders.tolist(),
        "ideal": None if curve is None else [axis.tolist() for axis in curve],
    }


def live_ema(node: LiveNode) -> dict[str, Any]:
    """The chart for the widgets as they are, over the files of the linked run as far as known."""
    schedule, sort = parse_schedule(node.value("method")), node.value("sort")
    first, last = node.value("first"), node.value("last")
    source = node.input("checkpoints")
    if source is not None and source.node_id == "BraidLoadCheckpoints":
        plan = _plan_of_files(source, schedule, sort, first, last)
        return chart_json(plan) | {"note": ""}
    if source is None:
        order, note = planned_order(range(1, EXAMPLE_COUNT + 1), "files"), EXAMPLE
    else:
        saved = _planned_steps(source)
        if len(saved) < 2:
            return {"message": _one_file(source)}
        order, note = planned_order(saved, "steps"), AS_PLANNED
    chosen = selected(order, first, last)
    return chart_json(plan_for_order(chosen, schedule)) | {"note": note}


def _plan_of_files(
    source: LiveNode, schedule: Schedule, sort: str, first: int, last: int
) -> AveragePlan:
    search = live_search()
    try:
        checkpoints = live_checkpoints(search, **source.values)
        return plan_average(checkpoints, schedule, sort, first, last, search)
    except SearchEndedError:
        raise DecidedByTheRunError(
            Text(
                "The folder holds more than is read while a graph is edited: run the graph to see "
                "its checkpoints here."
            )
        ) from None


def _checkpointing(train: LiveNode) -> LiveNode | None:
    """The Checkpoints and Resume node in the options of a Train LoRA node."""
    options = train.input("options")
    while options is not None and options.node_id != "BraidCheckpointing":
        options = options.input("options")
    return options


def _planned_steps(train: LiveNode) -> Sequence[int]:
    """Steps at which a Train LoRA node will save: its checkpoints, and the finished LoRA."""
    steps, options = train.value("steps"), _checkpointing(train)
    if options is None:
        return [steps]
    told = Checkpointing(
        save_every_n_steps=options.value("save_every_n_steps"),
        save_last_n=options.value("save_last_n"),
    )
    kept = told.kept(told.saving_steps(steps))
    return kept if kept and kept[-1] == steps else [*kept, steps]


def _one_file(train: LiveNode) -> Text:
    """That one file is no average, and what to set so that a run saves more on its way."""
    steps, options = train.value("steps"), _checkpointing(train)
    if options is None:
        return Text(
            "The linked run saves only its finished LoRA, and one file is no average: link "
            "Checkpoints and Resume to the options of Train LoRA."
        )
    told = {
        "every": options.value("save_every_n_steps"),
        "steps": steps,
        "wanted": max(1, steps // EXAMPLE_COUNT),
        "count": EXAMPLE_COUNT,
    }
    if not told["every"]:
        return Text(
            "The linked run saves only its finished LoRA, and one file is no average: "
            "save_every_n_steps is 0; {wanted} saves about {count} checkpoints.",
            **told,
        )
    return Text(
        "The linked run saves only its finished LoRA, and one file is no average: "
        "save_every_n_steps is {every} of {steps} steps; {wanted} saves about {count} checkpoints.",
        **told,
    )
