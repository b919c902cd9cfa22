"""MagCache on a MODEL, through ComfyUI's wrappers alone.

    OUTER_SAMPLE    decides the whole schedule from the run's sigmas; gives birth to the run's state
    PREDICT_NOISE   one tick per model call of the sampler
    APPLY_MODEL     computes and remembers, or predicts; once per batch of conditionings

The state travels in the run's own copy of the model options and dies with it, on error and on
interrupt too. APPLY_MODEL is above the network, so every architecture works, a compiled network
never sees Python state of ours, and packed streams (video with audio) are one tensor.
"""

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...magcache.clock import StepClock
from ...magcache.plan import MagCachePlan, mismatches
from ...magcache.report import ConditioningCount, RunReport
from ...magcache.residuals import ResidualCache
from ...magcache.rules import PlannedRule, Rule
from ...magcache.schedule import plan_schedule
from .blocks import block_keys
from .conditions import run_conditions, schedule_knots, skippable
from .run import KEY, Run, apply_model, predict_noise
from .samplers import OWN_LEVELS, adds_noise, calls_follow_schedule, noisy_by_name, sampler_name

CALIBRATE_KEY = "braid.magcache.calibrate"
RIVALS = {
    "lazycache": "LazyCache",
    "easycache": "EasyCache or LazyCache",  # both leave their state under this key
    "teacache": "TeaCache",
}
"""Key of another cache -> the nodes that leave it on a model."""
logger = logging.getLogger("comfyui_braid.magcache")


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCacheSettings:
    """What the node asks for."""

    plan: MagCachePlan
    rule: Rule
    measure: str = "latent"
    """`latent` (the whole model's output) or `blocks` (the residual of the block stack)."""
    start_percent: float = 0.0
    """Steps before this part of the sampling process are computed."""
    end_percent: float = 1.0
    """Steps after this part of the sampling process are computed."""

    def __post_init__(self) -> None:
        if self.measure not in ("latent", "blocks"):
            raise ValueError(f"measure: got {self.measure!r}, allowed are latent and blocks")
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            raise ValueError(
                f"start_percent {self.start_percent} and end_percent {self.end_percent}: "
                "allowed is 0 <= start <= end <= 1"
            )


class MagCachePatch:
    """The wrappers of one MagCache node. Holds settings and the report of the last finished run."""

    def __init__(self, settings: MagCacheSettings) -> None:
        self.settings = settings
        self.last_report: RunReport | None = None

    def attach(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of `model` with this cache; the one of an earlier MagCache node is replaced.

        ValueError when the model is being calibrated, has another cache, or has no block hooks.
        """
        if model.get_wrappers(WrappersMP.OUTER_SAMPLE, CALIBRATE_KEY):
            raise ValueError(
                "this model comes from MagCache Calibrate, which must see every step: connect the "
                "model from before it"
            )
        refuse_rivals(model.model_options)
        if self.settings.measure == "blocks":
            block_keys(model)
        patched = model.clone()
        detach(patched, KEY)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.outer_sample)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict_noise)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model)
        return patched

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE wrapper: plan, sample, report, forget."""
        guider = executor.class_obj
        refuse_rivals(guider.model_options)
        self.last_report = None
        if len(sigmas) < 2:  # no step to run, as after Split Sigmas at step 0
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        run = self._begin(guider, sampler, sigmas.tolist(), noise)
        original = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(original)
        guider.model_options.setdefault("transformer_options", {})[KEY] = run
        started = time.perf_counter()
        try:
            samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            guider.model_options = original
        self.last_report = _report(run, time.perf_counter() - started)
        logger.info(self.last_report.line())
        return samples

    def _begin(self, guider, sampler, sigmas: list[float], latent: Tensor) -> Run:
        settings, patcher = self.settings, guider.model_patcher
        plan = settings.plan
        conditions = run_conditions(guider, sampler, sigmas, latent, settings.measure)
        unfit = _unfit(patcher, conditions.sampler)
        allowed = [
            ok and not unfit
            for ok in skippable(patcher, sigmas, settings.start_percent, settings.end_percent)
        ]
        knots = schedule_knots(patcher, plan.conditions.steps)
        rule, about_noise = _rule_for(settings, sampler)
        schedule = plan_schedule(plan, sigmas, rule, allowed, knots)
        differ = mismatches(plan.conditions, conditions) if plan.calibrated else []
        warnings = [*differ, *about_noise, *schedule.warnings, *unfit]
        for warning in warnings:
            logger.warning("MagCache: %s", warning)
        return Run(
            schedule=replace(schedule, warnings=tuple(warnings)),
            blocks=block_keys(patcher) if settings.measure == "blocks" else [],
            clock=StepClock(sigmas, calls_follow_schedule(sampler)),
            cache=ResidualCache(schedule.extrapolate),
            predicted_from=schedule.predicted_from,
        )


def _unfit(patcher: ModelPatcher, sampler: str) -> list[str]:
    """Why no step of this run may be skipped."""
    found = []
    if patcher.get_additional_models_with_key("multigpu"):
        found.append("several GPUs sample this model together: every step is computed")
    if sampler in OWN_LEVELS:
        found.append(f"{sampler} chooses its own noise levels: every step is computed")
    return found


def _rule_for(
    settings: MagCacheSettings, sampler: comfy.samplers.Sampler
) -> tuple[Rule, list[str]]:
    """The rule of a run, and sentences about noise that is added between the model's calls.

    Fresh noise lies on no line, and extrapolating amplifies it. A calibration under it measures
    mostly noise that the next computed step removes anyway.
    """
    rule, warnings = settings.rule, []
    if not isinstance(rule, PlannedRule):
        return rule, warnings
    measured_with = settings.plan.conditions.sampler
    if noisy_by_name(measured_with):
        warnings.append(
            f"calibrated with {measured_with}, which adds noise: calibrate with euler instead, its "
            "plan serves every sampler"
        )
    if rule.predict == "extrapolate" and adds_noise(sampler):
        rule = replace(rule, predict="reuse")
        warnings.append(
            f"{sampler_name(sampler)} adds noise, which would be extrapolated: skipped steps "
            "repeat the last computed one (predict reuse)"
        )
    return rule, warnings


def magcache_of(model: ModelPatcher) -> MagCachePatch:
    """The cache on `model`; ValueError when it has none."""
    wrappers = model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    if not wrappers:
        raise ValueError(
            "this model has no MagCache on it: connect the model that came out of the MagCache node"
        )
    return wrappers[0].__self__


def detach(model: ModelPatcher, key: str) -> None:
    """Remove the wrappers under `key` from a clone."""
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.APPLY_MODEL):
        model.remove_wrappers_with_key(kind, key)


def refuse_rivals(model_options: dict[str, Any]) -> None:
    """ValueError when another cache is on the model; two caches would predict from predictions."""
    options = model_options.get("transformer_options", {})
    outer = options.get("wrappers", {}).get(WrappersMP.OUTER_SAMPLE, {})
    for key, rival in RIVALS.items():
        if key in options or key in outer:
            raise ValueError(
                f"{rival} is already on this model, and two caches would predict from predictions: "
                "remove one of the two nodes"
            )


def _report(run: Run, seconds: float) -> RunReport:
    names = dict.fromkeys([*run.computed, *run.predicted])
    return RunReport(
        schedule=run.schedule,
        conditionings=tuple(
            ConditioningCount(
                label=name,
                computed=tuple(run.computed.get(name, ())),
                skipped=tuple(run.predicted.get(name, ())),
            )
            for name in names
        ),
        seconds=seconds,
    )
