"""Inputs that the MagCache nodes share, their values as engine objects, and the live strip."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...engine.comfyui.magcache.patch import MagCacheSettings
from ...engine.magcache.curve import resampled_sigmas
from ...engine.magcache.plan import MagCachePlan, plan_from_ratios, read_plan
from ...engine.magcache.presets import preset_named, presets
from ...engine.magcache.report import schedule_dict
from ...engine.magcache.rules import MagCacheRule, PlannedRule, Rule
from ...engine.magcache.schedule import Schedule, plan_schedule
from .. import live, sockets
from ..outputs import inside_output, newest_first, output_folder

AUTO, FROM_RATIOS = "auto", "from mag_ratios"
SUBFOLDER = "magcache"


def preset_input(auto: bool) -> io.Combo.Input:
    """The published lists; `auto` only where a model is at hand to recognise."""
    names = [*([AUTO] if auto else []), *presets(), FROM_RATIOS]
    recognise = "auto recognises the model. " if auto else ""
    return io.Combo.Input(
        "preset",
        options=names,
        default=names[0] if auto else "FLUX.1-dev",
        tooltip=f"Published magnitude ratios of one model. {recognise}from mag_ratios takes the "
        "list below. Not used when a plan is connected.",
    )


def ratios_input() -> io.String.Input:
    return io.String.Input(
        "mag_ratios",
        default="0",
        multiline=True,
        tooltip="Magnitude ratio of each step to the one before, comma-separated, the first is 1 "
        "(musubi-tuner's --magcache_mag_ratios). 0 takes the preset's list. Several lines are the "
        "sections of one video; they are averaged.",
    )


def plan_input() -> io.Input:
    return sockets.MagCachePlan.Input(
        "plan",
        optional=True,
        tooltip="A calibration from MagCache Calibration or Load Calibration. Wins over preset and "
        "mag_ratios; rule planned needs one.",
    )


def rule_input() -> io.DynamicCombo.Input:
    return io.DynamicCombo.Input(
        "rule",
        options=[
            io.DynamicCombo.Option("magcache", _magcache_inputs()),
            io.DynamicCombo.Option("planned", _planned_inputs()),
        ],
        tooltip="magcache: the paper's rule on magnitude ratios. planned: the schedule with the "
        "least error that a calibration predicts, for a speed-up you choose.",
    )


def _k_input() -> io.Int.Input:
    return io.Int.Input(
        "k",
        default=6,
        min=0,
        max=32,
        tooltip="Most steps skipped in a row, in steps. 6 suits 50 steps, 2 or 3 suit 20. 0 "
        "turns the cache off.",
    )


def _magcache_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "threshold",
            default=0.24,
            min=0.0,
            max=10.0,
            step=0.005,
            round=0.0001,
            tooltip="Largest accumulated error, the sum of |1 - ratio| over the steps skipped in a "
            "row (no unit). Higher skips more; 0 turns the cache off.",
        ),
        io.Float.Input(
            "retention_ratio",
            default=0.2,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Part of the run, from its start, that is always computed: 0.2 is the first "
            "fifth.",
        ),
        _k_input(),
        io.Combo.Input(
            "interpolation",
            options=["cumulative", "nearest"],
            default="cumulative",
            advanced=True,
            tooltip="Ratios at another number of steps than the list's: cumulative multiplies "
            "them up over the noise level; nearest picks the nearest entry, as the authors and "
            "musubi-tuner.",
        ),
    ]


def _planned_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "speedup",
            default=2.0,
            min=1.0,
            max=10.0,
            step=0.05,
            tooltip="Steps of the run over computed steps; 2 computes every second step on "
            "average. 1 "
            "turns the cache off.",
        ),
        io.Int.Input(
            "warmup_steps",
            default=2,
            min=1,
            max=100,
            tooltip="Steps computed at the start, in steps; extrapolation needs at least 2.",
        ),
        _k_input(),
        io.Combo.Input(
            "predict",
            options=["extrapolate", "reuse"],
            default="extrapolate",
            tooltip="A skipped step: extrapolate takes the line through the last two computed "
            "steps over the noise level, reuse repeats the last one.",
        ),
        io.Float.Input(
            "max_error",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.001,
            round=0.00001,
            advanced=True,
            tooltip="Instead of speedup: the fewest computed steps whose predicted error stays "
            "below this (RMS of the final latent, in latent units). 0 uses speedup.",
        ),
    ]


def parse_rule(values: Mapping[str, Any]) -> Rule:
    """The dynamic combo's value as the engine's rule."""
    options = {name: value for name, value in values.items() if name != "rule"}
    return MagCacheRule(**options) if values["rule"] == "magcache" else PlannedRule(**options)


def plan_from_widgets(preset: str, mag_ratios: str) -> MagCachePlan | None:
    """The list typed, else the preset's; None for `auto`, which needs the model."""
    typed = mag_ratios.strip()
    if typed not in ("", "0"):
        return plan_from_ratios(mag_ratios)
    if preset == FROM_RATIOS:
        raise ValueError(
            "preset is 'from mag_ratios' and mag_ratios is empty: paste a comma-separated list "
            "there, "
            "or choose a preset"
        )
    return None if preset == AUTO else preset_named(preset)


def sigmas_for(plan: MagCachePlan, steps: int) -> tuple[float, ...]:
    """The plan's own schedule at `steps`; evenly spaced where its noise levels are not known."""
    return resampled_sigmas(plan.conditions.sigmas or (1.0, 0.0), steps)


def calibration_folder() -> Path:
    return output_folder() / SUBFOLDER


def calibration_files() -> list[str]:
    """Saved calibrations under output/magcache, newest first."""
    folder = calibration_folder()
    return [path.relative_to(folder).as_posix() for path in newest_first(folder, "*.json")]


def load_calibration(name: str) -> MagCachePlan:
    """A saved calibration by its name in the combo; ValueError when there is none."""
    path = inside_output("file", name, SUBFOLDER)
    if not path.is_file():
        raise ValueError(f"file {name!r} is no saved calibration: save one, or refresh the list")
    return read_plan(path)


def strip(schedule: Schedule, plan: MagCachePlan) -> dict[str, Any]:
    """What `web/magcache/chart.js` draws; there an `error` would be a sentence."""
    numbers = schedule_dict(schedule)
    total_error = numbers.pop("error")
    return {
        **numbers,
        "total_error": total_error,
        "name": plan.name,
        "rule": "planned" if schedule.planned else "magcache",
    }


def steps_in_range(settings: MagCacheSettings, steps: int) -> list[bool]:
    """For every step, whether it may be skipped: on a model's own schedules the percentages of the
    sampling process are shares of the steps."""
    start, end = settings.start_percent, settings.end_percent
    return [start <= step / steps < end for step in range(steps)]


def live_magcache(node: live.LiveNode) -> dict[str, Any]:
    """The strip of the steps that the node would skip; a sentence where only a run can know."""
    plan, note = _live_plan(node)
    if plan is None:
        return {"message": note}
    ends = ("start_percent", "end_percent")
    settings = MagCacheSettings(
        plan=plan,
        rule=parse_rule(node.value("rule")),
        **{name: node.value(name) for name in ends if name in node.widgets},
    )
    return planned_strip(settings, _live_steps(node) or plan.conditions.steps)


def planned_strip(settings: MagCacheSettings, steps: int) -> dict[str, Any]:
    """The strip of a run of so many steps on the plan's own schedule."""
    sigmas, allowed = sigmas_for(settings.plan, steps), steps_in_range(settings, steps)
    return strip(plan_schedule(settings.plan, sigmas, settings.rule, allowed), settings.plan)


def _live_steps(node: live.LiveNode) -> int:
    """Steps of the node itself, or of the sampler after it; 0 when neither says."""
    if "steps" in node.widgets:
        return int(node.value("steps"))
    downstream = node.widgets.get("steps_downstream", 0)
    if downstream is None:
        raise live.DecidedByTheRunError(
            "The sampler's steps come from a linked node: run the graph to see the strip here."
        )
    return int(downstream)


def _live_plan(node: live.LiveNode) -> tuple[MagCachePlan | None, str]:
    source = node.inputs.get("plan")
    if source is not None and source.node_id == "BraidLoadCalibration":
        return load_calibration(source.value("file")), ""
    if "plan" in node.inputs:
        return (
            None,
            "The steps show here once the connected plan has been measured: queue the graph.",
        )
    plan = plan_from_widgets(node.value("preset"), node.value("mag_ratios"))
    return plan, "Preset auto recognises the model when the graph runs; the steps show here then."


live.LIVE["magcache"] = live_magcache
