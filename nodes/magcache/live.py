"""The strip of the steps that MagCache skips, in its nodes: live, and as a run has it."""

from typing import Any

from comfy_api.latest import io

from ...engine.magcache.plan import MagCachePlan, calibrated_name
from ...engine.magcache.rules import MagCacheSettings, PlannedRule
from ...engine.magcache.schedule import MAX_STEPS, Schedule, plan_schedule
from ...engine.magcache.shortest_path import path_operations
from ...engine.texts import Text
from ..live_node import DecidedByTheRunError, LiveNode, checked
from .inputs import (
    MOST_DRAWN,
    calibration_file,
    load_calibration,
    parse_rule,
    plan_from_widgets,
    sigmas_for,
)

LIVE_BYTES = 4 << 20
"""Of a calibration that is read while a widget moves."""
LIVE_OPERATIONS = 30_000_000
"""Additions that the live strip plans with, two tenths of a second."""
STEPS_DOWNSTREAM = io.Int.Input("steps_downstream", min=1, max=MAX_STEPS)
"""What web/magcache/downstream.js adds to the node's widgets: the steps of the sampler after it."""


def strip(schedule: Schedule, plan: MagCachePlan) -> dict[str, Any]:
    """What `web/magcache/chart.js` draws; there an `error` would be a sentence."""
    numbers = schedule.to_dict()
    total_error = numbers.pop("error")
    return {
        **numbers,
        "total_error": total_error,
        "name": shown_name(plan),
        "rule": "planned" if schedule.planned else "magcache",
    }


def shown_name(plan: MagCachePlan) -> str:
    """The plan's name; the one that a calibration gives itself as a Text, for the page."""
    measured = calibrated_name(plan.conditions)
    return measured if plan.name == measured else plan.name


def steps_in_range(settings: MagCacheSettings, steps: int) -> list[bool]:
    """For every step, whether it may be skipped: on a model's own schedules the percentages of the
    sampling process are shares of the steps."""
    start, end = settings.start_percent, settings.end_percent
    return [start <= step / steps < end for step in range(steps)]


def live_magcache(node: LiveNode) -> dict[str, Any]:
    """The strip of the steps that the node would skip; a sentence where only a run can know."""
    plan, rule = _live_plan(node), parse_rule(node.value("rule"))
    ends = ("start_percent", "end_percent")
    percents = {name: node.value(name) for name in ends if name in node.widgets}
    settings = MagCacheSettings(plan=plan, rule=rule, **percents)
    steps = _live_steps(node) or plan.conditions.steps
    if isinstance(rule, PlannedRule) and path_operations(steps, rule.k) > LIVE_OPERATIONS:
        sentence = Text(
            "{steps} steps with k {k} take more than a moment to plan: run the graph to see the "
            "strip here.",
            steps=steps,
            k=rule.k,
        )
        raise DecidedByTheRunError(sentence)
    return planned_strip(settings, steps)


def planned_strip(settings: MagCacheSettings, steps: int) -> dict[str, Any]:
    """The strip of a run of so many steps on the plan's own schedule."""
    if steps > MOST_DRAWN:
        return too_long(steps)
    sigmas, allowed = sigmas_for(settings.plan, steps), steps_in_range(settings, steps)
    return strip(plan_schedule(settings.plan, sigmas, settings.rule, allowed), settings.plan)


def too_long(steps: int) -> dict[str, Any]:
    """What stands where a strip would be."""
    sentence = Text(
        "{steps} steps are too many to draw here; up to {most} are.", steps=steps, most=MOST_DRAWN
    )
    return {"message": sentence}


def _live_steps(node: LiveNode) -> int:
    """Steps of the node itself, or of the sampler after it; 0 when neither says."""
    if node.node_id == "BraidMagCachePlan":
        return node.value("steps")
    if STEPS_DOWNSTREAM.id not in node.widgets:
        return 0
    if node.widgets[STEPS_DOWNSTREAM.id] is None:
        sentence = Text(
            "The sampler's steps come from a linked node: run the graph to see the strip here."
        )
        raise DecidedByTheRunError(sentence)
    return checked(STEPS_DOWNSTREAM, node.widgets)


def _live_plan(node: LiveNode) -> MagCachePlan:
    source = node.inputs.get("plan")
    if source is not None and source.node_id == "BraidLoadCalibration":
        name = source.value("file")
        if calibration_file(name).stat().st_size > LIVE_BYTES:
            raise DecidedByTheRunError(
                Text("{name} is large: run the graph to see its strip here.", name=name)
            )
        return load_calibration(name)
    if "plan" in node.inputs:
        raise DecidedByTheRunError(
            Text("The steps show here once the connected plan has been measured: queue the graph.")
        )
    plan = plan_from_widgets(node.value("preset"), node.value("mag_ratios"))
    if plan is None:
        raise DecidedByTheRunError(
            Text("Preset auto recognises the model when the graph runs; the steps show here then.")
        )
    return plan
