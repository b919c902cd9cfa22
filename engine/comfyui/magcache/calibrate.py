"""Measures a full run: every conditioning's residual, and the guided prediction, step by step."""

from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor
from comfy.samplers import Sampler
from torch import Tensor

from ...magcache.calibration import GUIDED, Measurement, average_of_alike
from ...magcache.clock import StepClock
from ...magcache.curve import falls
from ...magcache.plan import Conditions, MagCachePlan
from ...magcache.residuals import velocity
from .blocks import BlockKey, measured_blocks
from .conditions import run_conditions
from .samplers import calls_follow_schedule
from .wrappers import CALIBRATE, ModelCall, computed, put_on, refuse_rivals, running

KEPT_RUNS = 16


class MeasuredRun(Measurement):
    """A run that computes everything and records its residuals; `blocks` as in `CachedRun`."""

    def __init__(self, conditions: Conditions, clock: StepClock, blocks: list[BlockKey]) -> None:
        super().__init__(conditions, clock)
        self._blocks = blocks

    def guided(self, x: Tensor, timestep: Tensor, predict: Callable[[], Tensor]) -> Tensor:
        """The guided prediction, recorded."""
        self.tick(timestep)
        denoised = predict()
        if self.active:
            self.add(GUIDED, velocity(x, denoised, self.clock.sigma), channel_dim=1)
        return denoised

    def applied(self, call: ModelCall) -> Tensor:
        """The denoised latents of a call, with the residual of every conditioning recorded."""
        if not self.active:
            return call.compute(call.options)
        denoised, residual = computed(call, self.clock.sigma, self._blocks)
        if residual is not None:
            for evaluation, part in zip(call.evaluations, call.parts, strict=False):
                channel_dim = -1 if self._blocks else 1
                self.add(self.names.name(evaluation), residual[part], channel_dim)
        return denoised


class Calibrator:
    """The handle of one MagCache Calibrate node: the plans of the runs that its model has done."""

    def __init__(self, measure: str = "latent") -> None:
        self.measure = measure
        self.plans: list[MagCachePlan] = []

    def attach(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of `model` that computes and measures every step, without any MagCache.

        ValueError when it has another cache, or no hooks for the blocks that are to be measured.
        """
        return put_on(model, CALIBRATE, self.measure, self.outer_sample)

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
        run = MeasuredRun(
            run_conditions(guider, sampler, levels, noise, self.measure),
            StepClock(levels, calls_follow_schedule(sampler)),
            measured_blocks(guider.model_patcher, self.measure),
        )
        with running(guider, CALIBRATE, run):
            samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
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
        return average_of_alike(self.plans)
