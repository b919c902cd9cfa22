"""The chart in Post-Hoc EMA: live, and as a run has it."""

from collections.abc import Sequence
from typing import Any

from ..engine.ema.average import AveragePlan, plan_average, plan_for_order
from ..engine.ema.figure import bars_of, ideal_curve
from ..engine.ema.order import planned_order, selected
from ..engine.ema.schedule import Schedule
from ..engine.folders import SearchEndedError
from ..engine.training.options import Checkpointing
from .ema_fields import parse_schedule
from .live_node import DecidedByTheRunError, LiveNode
from .training.checkpoints import live_checkpoints, live_search

EXAMPLE_COUNT = 10
"""Checkpoints that the live chart shows while no run is known."""


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
    steps = () if source is None else _planned_steps(source)
    if steps:
        order, note = planned_order(steps, "steps"), "as the linked run will save them"
    else:
        order = planned_order(range(1, EXAMPLE_COUNT + 1), "files")
        note = "an example: no run is linked yet"
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
            "The folder holds more than is read while a graph is edited: run the graph to see its "
            "checkpoints here."
        ) from None


def _planned_steps(node: LiveNode) -> Sequence[int]:
    """Steps at which a Train LoRA node will save; none for other nodes, or while not known."""
    options = node.input("options")
    while options is not None and options.node_id != "BraidCheckpointing":
        options = options.input("options")
    if node.node_id != "BraidTrainLora" or options is None:
        return ()
    checkpointing = Checkpointing(
        save_every_n_steps=options.value("save_every_n_steps"),
        save_last_n=options.value("save_last_n"),
    )
    return checkpointing.kept(checkpointing.saving_steps(node.value("steps")))
