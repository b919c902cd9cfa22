"""MagCache on a MODEL, through ComfyUI's wrappers alone.

    OUTER_SAMPLE    decides the whole schedule from the run's sigmas; gives birth to the run's state
    PREDICT_NOISE   one tick per model call of the sampler
    APPLY_MODEL     computes and remembers, or predicts; once per batch of conditionings

The state travels in the run's own copy of the model options and dies with it, on error and on
interrupt too. APPLY_MODEL is above the network, so every architecture works, a compiled network never
sees Python state of ours, and packed streams (video with audio) are one tensor.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..magcache.plan import MagCachePlan, mismatches
from ..magcache.report import ConditioningCount, RunReport
from ..magcache.rules import Rule
from ..magcache.schedule import Schedule, plan_schedule
from .magcache_blocks import BlockKey, StackMeasure, block_keys, skipping_hooks, with_hooks
from .magcache_cache import (
    Key,
    ResidualCache,
    predicted_denoised,
    residual_on_line,
    slices,
    velocity,
)
from .magcache_conditions import run_conditions, schedule_knots, skippable
from .magcache_samplers import StepClock, calls_follow_schedule

KEY = "braid.magcache"
CALIBRATE_KEY = "braid.magcache.calibrate"
RIVALS = ("easycache", "lazycache", "teacache")
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


def conditioning_keys(options: dict[str, Any], calls: dict[Key, int]) -> list[Key]:
    """One key per conditioning of a batch: its uuid, how often it came in this prediction, its frames.

    Guidance nodes may evaluate a conditioning twice in a step with other options, and context windows
    evaluate it on other frames; neither may use the other's residual. `calls` counts per prediction.
    """
    window = options.get("context_window")
    frames = tuple(window.index_list) if window is not None else ()
    keys = []
    for uuid in options["uuids"]:
        calls[uuid, frames] = calls.get((uuid, frames), 0) + 1
        keys.append((uuid, calls[uuid, frames], frames))
    return keys


class ConditioningNames:
    """Names for conditionings in the order they appear: positive, negative, positive 2 …"""

    def __init__(self) -> None:
        self.names: dict[Key, str] = {}
        self._used: dict[str, int] = {}

    def name(self, key: Key, index: int) -> str:
        """The name of `key`, which belongs to conditioning list `index` of the guider."""
        if key not in self.names:
            kind = ("positive", "negative")[index] if index < 2 else f"conditioning {index + 1}"
            self._used[kind] = self._used.get(kind, 0) + 1
            number = self._used[kind]
            self.names[key] = kind if number == 1 else f"{kind} {number}"
        return self.names[key]


@dataclass
class Run:
    """Everything one sampling run remembers; dropped when the run ends."""

    schedule: Schedule
    quantity: str
    blocks: list[BlockKey]
    """Keys of the block stack when measuring blocks, else empty."""
    clock: StepClock
    cache: ResidualCache
    skipped: frozenset[int]
    step: int = 0
    sigma: float = 0.0
    on_schedule: bool = True
    calls: dict[Key, int] = field(default_factory=dict)
    names: ConditioningNames = field(default_factory=ConditioningNames)
    computed: dict[str, list[int]] = field(default_factory=dict)
    predicted: dict[str, list[int]] = field(default_factory=dict)

    def tick(self, timestep: Tensor) -> None:
        """A new model call of the sampler begins."""
        self.step, self.sigma, self.on_schedule = self.clock.tick(timestep)
        self.calls.clear()

    def may_skip(self, keys: list[Key], x: Tensor) -> bool:
        """True when the schedule skips this step and every conditioning has a fitting residual."""
        parts = slices(x.shape[0], len(keys))
        return (
            self.step in self.skipped
            and bool(parts)
            and all(
                self.cache.fits(key, x[part].shape, x.dtype, x.device)
                for key, part in zip(keys, parts, strict=True)
            )
        )

    def note(self, keys: list[Key], options: dict[str, Any], skipped: bool) -> None:
        """Count the call for the report."""
        into = self.predicted if skipped else self.computed
        for key, index in zip(keys, options["cond_or_uncond"], strict=True):
            into.setdefault(self.names.name(key, index), []).append(self.step)


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
        conditions = run_conditions(guider, sampler, sigmas, latent, settings.measure)
        several = bool(patcher.get_additional_models_with_key("multigpu"))
        allowed = [
            ok and not several
            for ok in skippable(patcher, sigmas, settings.start_percent, settings.end_percent)
        ]
        knots = schedule_knots(patcher, settings.plan.conditions.steps)
        schedule = plan_schedule(settings.plan, sigmas, settings.rule, allowed, knots)
        warnings = [*mismatches(settings.plan.conditions, conditions), *schedule.warnings]
        if several:
            warnings.append("several GPUs sample this model together: every step is computed")
        for warning in warnings:
            logger.warning("MagCache: %s", warning)
        return Run(
            schedule=replace(schedule, warnings=tuple(warnings)),
            quantity=conditions.quantity,
            blocks=block_keys(patcher) if settings.measure == "blocks" else [],
            clock=StepClock(sigmas, calls_follow_schedule(sampler)),
            cache=ResidualCache(schedule.extrapolate),
            skipped=frozenset(schedule.skipped),
        )


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
    for rival in RIVALS:
        if rival in options or rival in outer:
            raise ValueError(
                f"{rival} is already on this model, and two caches would predict from predictions: "
                "remove one of the two nodes"
            )


def predict_noise(executor, x, timestep, model_options=None, seed=None):
    """PREDICT_NOISE wrapper: one model call of the sampler."""
    model_options = model_options or {}
    run = model_options.get("transformer_options", {}).get(KEY)
    if run is not None:
        run.tick(timestep)
    return executor(x, timestep, model_options, seed)


def apply_model(
    executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
):
    """APPLY_MODEL wrapper: the denoised latents of a batch of conditionings, computed or predicted."""
    options = transformer_options or {}
    run = options.get(KEY)
    options = {key: value for key, value in options.items() if key != KEY}

    def compute(options: dict[str, Any]) -> Tensor:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    if run is None or "uuids" not in options:
        return compute(options)
    keys = conditioning_keys(options, run.calls)
    if control is not None or executor.class_obj.current_patcher.current_hooks is not None:
        for key in keys:  # what it computes changes from step to step for other reasons
            run.cache.drop(key)
        run.note(keys, options, skipped=False)
        return compute(options)
    through = _blocks if run.blocks else _latent
    return through(run, keys, x, options, compute)


Compute = Callable[[dict[str, Any]], Tensor]


def _latent(run: Run, keys: list[Key], x: Tensor, options: dict[str, Any], compute: Compute) -> Tensor:
    skip = run.may_skip(keys, x)
    run.note(keys, options, skip)
    if skip:
        return predicted_denoised(run.cache, keys, x, run.sigma, run.quantity)
    denoised = compute(options)
    if run.skipped and run.on_schedule and run.sigma > 0:
        residual = denoised if run.quantity == "denoised" else velocity(x, denoised, run.sigma)
        for key, part in zip(keys, slices(x.shape[0], len(keys)), strict=False):
            run.cache.store(key, run.sigma, residual[part], x.dtype)
    return denoised


def _blocks(run: Run, keys: list[Key], x: Tensor, options: dict[str, Any], compute: Compute) -> Tensor:
    """As `_latent`, for the residual of the block stack; embedding and output layers always run.

    The hidden state's shape is only known inside the network, so each key also carries x's shape.
    """
    keys = [(key, x.shape[1:], x.dtype) for key in keys]
    parts = slices(x.shape[0], len(keys))
    patched_between = {"double_block", "single_block"} & set(options.get("patches", {}))
    known = bool(parts) and not patched_between and all(map(run.cache.holds, keys))
    skip = known and run.step in run.skipped
    run.note(keys, options, skip)
    if skip:
        return compute(with_hooks(options, skipping_hooks(run.blocks, _residual_for(run, keys))))
    if not (run.skipped and run.on_schedule and parts):
        return compute(options)
    measure = StackMeasure(run.blocks)
    denoised = compute(with_hooks(options, measure.hooks()))
    residual = measure.residual
    if residual is not None:
        for key, part in zip(keys, parts, strict=True):
            run.cache.store(key, run.sigma, residual[part], residual.dtype)
    return denoised


def _residual_for(run: Run, keys: list[Key]) -> Callable[[Tensor], Tensor]:
    def residual_for(hidden: Tensor) -> Tensor:
        out = torch.empty_like(hidden)
        for key, part in zip(keys, slices(hidden.shape[0], len(keys)), strict=True):
            newest, before, w = run.cache.line(key, run.sigma)
            residual_on_line(newest.residual, before.residual if before else None, w, out[part])
        return out

    return residual_for


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
