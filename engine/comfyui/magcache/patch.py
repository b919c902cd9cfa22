"""MagCache on a MODEL: decides the whole schedule of a run before it begins, and reports it."""

import logging
import time
from dataclasses import replace
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider, Sampler
from torch import Tensor

from ...magcache.clock import StepClock
from ...magcache.plan import mismatches
from ...magcache.rules import MagCacheSettings, PlannedRule, Rule
from ...magcache.run import RunReport
from ...magcache.schedule import plan_schedule
from .blocks import measured_blocks
from .conditions import run_conditions, schedule_knots, skippable
from .run import CachedRun
from .samplers import OWN_LEVELS, adds_noise, calls_follow_schedule, noisy_by_name, sampler_name
from .wrappers import CACHE, CALIBRATE, put_on, refuse_rivals, running

logger = logging.getLogger("comfyui_braid.magcache")


class MagCachePatch:
    """The wrappers of one MagCache node. Holds settings and the report of the last finished run."""

    def __init__(self, settings: MagCacheSettings) -> None:
        self.settings = settings
        self.last_report: RunReport | None = None

    def attach(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of `model` with this cache; the one of an earlier MagCache node is replaced.

        ValueError when the model is being calibrated, has another cache, or has no block hooks.
        """
        if model.get_wrappers(WrappersMP.OUTER_SAMPLE, CALIBRATE):
            raise ValueError(
                "this model comes from MagCache Calibrate, which must see every step: connect the "
                "model from before it"
            )
        return put_on(model, CACHE, self.settings.measure, self.outer_sample)

    def outer_sample(
        self,
        executor: WrapperExecutor,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Sampler,
        sigmas: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """OUTER_SAMPLE wrapper: plan, sample, report, forget."""
        guider = executor.class_obj
        refuse_rivals(guider.model_options)
        self.last_report = None
        if len(sigmas) < 2:  # no step to run, as after Split Sigmas at step 0
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        run = self._begin(guider, sampler, sigmas.tolist(), noise)
        started = time.perf_counter()
        with running(guider, CACHE, run):
            samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        self.last_report = run.report(time.perf_counter() - started)
        logger.info(self.last_report.line())
        return samples

    def _begin(
        self, guider: CFGGuider, sampler: Sampler, sigmas: list[float], latent: Tensor
    ) -> CachedRun:
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
        return CachedRun(
            replace(schedule, warnings=tuple(warnings)),
            StepClock(sigmas, calls_follow_schedule(sampler)),
            measured_blocks(patcher, settings.measure),
        )


def _unfit(patcher: ModelPatcher, sampler: str) -> list[str]:
    """Why no step of this run may be skipped."""
    found: list[str] = []
    if patcher.get_additional_models_with_key("multigpu"):
        found.append("several GPUs sample this model together: every step is computed")
    if sampler in OWN_LEVELS:
        found.append(f"{sampler} chooses its own noise levels: every step is computed")
    return found


def _rule_for(settings: MagCacheSettings, sampler: Sampler) -> tuple[Rule, list[str]]:
    """The rule of a run, and sentences about noise that is added between the model's calls.

    Fresh noise lies on no line, and extrapolating amplifies it. A calibration under it measures
    mostly noise that the next computed step removes anyway.
    """
    rule = settings.rule
    warnings: list[str] = []
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
    wrappers = model.get_wrappers(WrappersMP.OUTER_SAMPLE, CACHE)
    if not wrappers:
        raise ValueError(
            "this model has no MagCache on it: connect the model that came out of the MagCache node"
        )
    patch: MagCachePatch = wrappers[0].__self__
    return patch
