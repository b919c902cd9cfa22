"""Inputs that the MagCache nodes share, and their values as engine objects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...engine.magcache.curve import resampled_sigmas
from ...engine.magcache.plan import MagCachePlan, plan_from_ratios, read_plan
from ...engine.magcache.presets import preset_named, presets
from ...engine.magcache.rules import MAX_PLANNED_K, MagCacheRule, PlannedRule, Rule
from .. import sockets
from ..outputs import inside_output, newest_first, output_folder

AUTO, FROM_RATIOS = "auto", "from mag_ratios"
SUBFOLDER = "magcache"
MOST_BYTES = 16 << 20
"""Of a saved calibration: a thousand steps and their inner products."""
MOST_DRAWN = 1_000
"""Steps of a strip: each is one bar."""


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


def measure_input(meaning: str) -> io.Combo.Input:
    """What is measured or cached, with what that means in the node."""
    return io.Combo.Input(
        "measure",
        options=["latent", "blocks"],
        default="latent",
        optional=True,
        advanced=True,
        tooltip=f"{meaning} latent: the whole model's output; any model, two latents of memory per "
        "conditioning. blocks: the residual of the block stack, as the paper; FLUX, Chroma, Wan "
        "(not VACE), Qwen-Image and Hunyuan.",
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
        max=MAX_PLANNED_K,
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
            "average. 1 turns the cache off.",
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
            "there, or choose a preset"
        )
    return None if preset == AUTO else preset_named(preset)


def sigmas_for(plan: MagCachePlan, steps: int) -> tuple[float, ...]:
    """The plan's own schedule at `steps`; evenly spaced where its noise levels are not known."""
    return resampled_sigmas(plan.conditions.sigmas or (1.0, 0.0), steps)


def levels_for(plan: MagCachePlan, steps: int, sigmas: Sequence[float] | None) -> Sequence[float]:
    """The noise levels of the run to plan: those given, else the plan's own schedule."""
    if sigmas is None:
        if not 1 <= steps <= MOST_DRAWN:
            raise ValueError(f"steps: got {steps}, MagCache Plan shows 1 to {MOST_DRAWN}")
        return sigmas_for(plan, steps)
    if not 2 <= len(sigmas) <= MOST_DRAWN + 1:
        raise ValueError(
            f"sigmas: got {len(sigmas)} values, MagCache Plan shows 2 to {MOST_DRAWN + 1}"
        )
    return sigmas


def calibration_folder() -> Path:
    return output_folder() / SUBFOLDER


def calibration_files() -> list[str]:
    """Saved calibrations under output/magcache, newest first."""
    folder = calibration_folder()
    return [path.relative_to(folder).as_posix() for path in newest_first(folder, "*.json")]


def calibration_file(name: str) -> Path:
    """A saved calibration by its name in the combo; ValueError when there is none."""
    path = inside_output("file", name, SUBFOLDER)
    if not path.is_file():
        raise ValueError(f"file {name!r} is no saved calibration: save one, or refresh the list")
    return path


def load_calibration(name: str) -> MagCachePlan:
    """What a saved calibration holds."""
    return read_plan(calibration_file(name))
