"""What a run under the cache does in each call: computes and remembers, or predicts."""

from collections.abc import Callable

from torch import Tensor

from ...magcache.clock import StepClock
from ...magcache.residuals import predicted_denoised, predicted_residual
from ...magcache.run import Run
from ...magcache.schedule import Schedule
from .blocks import BlockKey, skipping_hooks, with_hooks
from .wrappers import ModelCall, computed


class CachedRun(Run):
    """A run whose skipped steps are predicted.

    From the residual of the block stack when `blocks` are given: embedding and output layers then
    run in every step. Else from the velocity of the whole model.
    """

    def __init__(self, schedule: Schedule, clock: StepClock, blocks: list[BlockKey]) -> None:
        super().__init__(schedule, clock)
        self._blocks = blocks

    def guided(self, x: Tensor, timestep: Tensor, predict: Callable[[], Tensor]) -> Tensor:
        """The guided prediction, of what `applied` computes or predicts."""
        self.clock.tick(timestep)
        return predict()

    def applied(self, call: ModelCall) -> Tensor:
        """The denoised latents of a call, computed or predicted."""
        skips = self._may_predict(call)
        self.note(call.evaluations, skips)
        if skips:
            return self._predict(call)
        if call.disturbed:  # what it computes changes from step to step for other reasons
            for evaluation in call.evaluations:
                self.cache.drop(evaluation)
        if call.disturbed or not (self.remembers and call.parts):
            return call.compute(call.options)
        return self._remember(call)

    def _may_predict(self, call: ModelCall) -> bool:
        patches = call.options.get("patches", {})
        between = bool(self._blocks) and ("double_block" in patches or "single_block" in patches)
        told_apart = bool(call.parts) and not call.disturbed
        return told_apart and not between and self.may_skip(call.evaluations)

    def _predict(self, call: ModelCall) -> Tensor:
        cache, evaluations, sigma = self.cache, call.evaluations, self.clock.sigma
        if not self._blocks:
            return predicted_denoised(cache, evaluations, call.x, sigma)

        def residual_for(hidden: Tensor) -> Tensor:
            return predicted_residual(cache, evaluations, hidden, sigma)

        return call.compute(with_hooks(call.options, skipping_hooks(self._blocks, residual_for)))

    def _remember(self, call: ModelCall) -> Tensor:
        step, sigma = self.clock.step, self.clock.sigma
        denoised, residual = computed(call, sigma, self._blocks)
        if residual is not None:
            for evaluation, part in zip(call.evaluations, call.parts, strict=True):
                self.cache.store(evaluation, step, sigma, residual[part])
        return denoised
