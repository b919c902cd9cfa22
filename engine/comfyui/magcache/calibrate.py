"""Measures a full run: every conditioning's residual, and the guided prediction, step by step."""

from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...magcache.calibration import ResidualRecorder, average_plans, calibrated_plan
from ...magcache.clock import StepClock
from ...magcache.curve import falls
from ...magcache.plan import POSITIVE, Conditions, MagCachePlan
from ...magcache.residuals import Key, slices, velocity
from .blocks import BlockKey, StackMeasure, block_keys, with_hooks
from .conditions import run_conditions
from .patch import CALIBRATE_KEY, detach, refuse_rivals
from .run import KEY, ConditioningNames, conditioning_keys
from .samplers import calls_follow_schedule

GUIDED = "guided prediction"
KEPT_RUNS = 16


@dataclass
class Measurement:
    """One run while it is being measured."""

    conditions: Conditions
    blocks: list[BlockKey]
    clock: StepClock
    step: int = 0
    sigma: float = 0.0
    measured: int = -1
    """Last step whose own noise level was measured; later calls of that step are not."""
    active: bool = False
    calls: dict[Key, int] = field(default_factory=dict)
    names: ConditioningNames = field(default_factory=ConditioningNames)
    recorders: dict[str, ResidualRecorder] = field(default_factory=dict)

    def tick(self, timestep: Tensor) -> None:
        """A new model call of the sampler begins; only the first at each step's level counts."""
        self.step, self.sigma, on_schedule = self.clock.tick(timestep)
        self.active = on_schedule and self.step > self.measured and self.sigma > 0
        self.measured = self.step if self.active else self.measured
        self.calls.clear()

    def add(self, label: str, residual: Tensor, channel_dim: int) -> None:
        """Record the residual of `label` at this step."""
        if label not in self.recorders:
            self.recorders[label] = ResidualRecorder(label, channel_dim)
        self.recorders[label].add(residual)

    def plan(self) -> MagCachePlan:
        """The finished plan; ValueError when not every step could be measured."""
        steps = self.conditions.steps
        whole = {label: r for label, r in self.recorders.items() if r.steps == steps}
        guided = whole.pop(GUIDED, None)
        if guided is None or not whole:
            raise ValueError(
                f"MagCache calibration: {self.conditions.sampler} did not call the model at all of "
                f"its {steps} noise levels; calibrate with euler, and use the plan with any sampler"
            )
        recorders = sorted(whole.values(), key=lambda r: not r.label.startswith(POSITIVE))
        return calibrated_plan(
            name=f"{self.conditions.model} calibrated at {steps} steps",
            conditions=self.conditions,
            recorders=recorders,
            cached=recorders if self.blocks else [guided],
            source="measured by MagCache Calibrate",
        )


class Calibrator:
    """The handle of one MagCache Calibrate node: the plans of the runs that its model has done."""

    def __init__(self, measure: str = "latent") -> None:
        self.measure = measure
        self.plans: list[MagCachePlan] = []

    def attach(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of `model` that computes and measures every step, without any MagCache."""
        refuse_rivals(model.model_options)
        if self.measure == "blocks":
            block_keys(model)
        patched = model.clone()
        detach(patched, KEY)
        detach(patched, CALIBRATE_KEY)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, CALIBRATE_KEY, self.outer_sample)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, CALIBRATE_KEY, predict_noise)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, CALIBRATE_KEY, apply_model)
        return patched

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE wrapper: measure a run; an interrupted run leaves the handle as it was."""
        guider = executor.class_obj
        refuse_rivals(guider.model_options)
        levels = sigmas.tolist()
        if len(levels) < 2:  # no step to run
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        if not falls(levels):
            raise ValueError(
                "MagCache Calibrate: the noise levels do not fall from step to step; calibrate "
                "with a sampling run that goes from noise to picture"
            )
        run = Measurement(
            conditions=run_conditions(guider, sampler, levels, noise, self.measure),
            blocks=block_keys(guider.model_patcher) if self.measure == "blocks" else [],
            clock=StepClock(levels, calls_follow_schedule(sampler)),
        )
        original = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(original)
        guider.model_options.setdefault("transformer_options", {})[CALIBRATE_KEY] = run
        try:
            samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            guider.model_options = original
        self.plans = [*self.plans, run.plan()][-KEPT_RUNS:]
        return samples

    def result(self) -> MagCachePlan:
        """The mean of the last runs under the same conditions; ValueError before any run."""
        if not self.plans:
            raise ValueError(
                "nothing has been measured yet: connect the latent of the sampler that used the "
                "calibrating model. If it is connected, the sampler's result came from ComfyUI's "
                "cache: change its seed and queue again"
            )
        last = self.plans[-1]
        alike = [
            plan
            for plan in self.plans
            if plan.conditions == last.conditions
            and [c.label for c in plan.curves] == [c.label for c in last.curves]
        ]
        return average_plans(alike)


def predict_noise(executor, x, timestep, model_options=None, seed=None):
    """PREDICT_NOISE wrapper: the guided prediction of one model call."""
    model_options = model_options or {}
    run = model_options.get("transformer_options", {}).get(CALIBRATE_KEY)
    if run is None:
        return executor(x, timestep, model_options, seed)
    run.tick(timestep)
    denoised = executor(x, timestep, model_options, seed)
    if run.active:
        run.add(GUIDED, velocity(x, denoised, run.sigma), channel_dim=1)
    return denoised


def apply_model(
    executor,
    x,
    t,
    c_concat=None,
    c_crossattn=None,
    control=None,
    transformer_options=None,
    **kwargs,
):
    """APPLY_MODEL wrapper: the residual of every conditioning of a batch."""
    options = transformer_options or {}
    run = options.get(CALIBRATE_KEY)
    options = {key: value for key, value in options.items() if key != CALIBRATE_KEY}

    def compute(options: dict[str, Any]) -> Tensor:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    if run is None or not run.active or "uuids" not in options:
        return compute(options)
    keys = conditioning_keys(options, x, run.calls)
    stack = StackMeasure(run.blocks) if run.blocks else None
    denoised = compute(with_hooks(options, stack.hooks()) if stack else options)
    residual = stack.residual if stack else velocity(x, denoised, run.sigma)
    parts = slices(x.shape[0], len(keys))
    for key, index, part in zip(keys, options["cond_or_uncond"], parts, strict=False):
        run.add(run.names.name(key, index), residual[part], channel_dim=-1 if stack else 1)
    return denoised
