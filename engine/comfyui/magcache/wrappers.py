"""How MagCache acts on a MODEL: through three of ComfyUI's wrappers, and through nothing else.

    OUTER_SAMPLE    a run begins: its state is born, and dropped when the run ends
    PREDICT_NOISE   one call of the guider
    APPLY_MODEL     one call of the model, on a batch of conditionings

The state travels in the run's own copy of the model options and dies with it, on error and on
interrupt too. APPLY_MODEL is above the network, so every architecture works, a compiled network
never sees Python state of ours, and packed streams (video with audio) are one tensor.
"""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import comfy.model_patcher
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ...magcache.clock import StepClock
from ...magcache.residuals import Evaluation, slices, velocity
from .blocks import BlockKey, StackMeasure, measured_blocks, with_hooks

CACHE, CALIBRATE = "braid.magcache", "braid.magcache.calibrate"
"""The two sides of MagCache: a model carries the wrappers of one of them."""
RIVALS = {
    "lazycache": "LazyCache",
    "easycache": "EasyCache or LazyCache",  # both leave their state under this key
    "teacache": "TeaCache",
}
"""Key of another cache -> the nodes that leave it on a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCall:
    """One call of the model on a batch of conditionings."""

    x: Tensor
    """(B, C, ...) noisy latents, one conditioning's after the other's."""
    options: dict[str, Any]
    """The `transformer_options`, without the run's state."""
    evaluations: list[Evaluation]
    """What the batch consists of."""
    disturbed: bool
    """True when a ControlNet or hooks act on it, which change from step to step by themselves."""
    compute: Callable[[dict[str, Any]], Tensor]
    """The denoised latents (B, C, ...) of `x`, under `transformer_options` of one's own."""

    @property
    def parts(self) -> list[slice]:
        """Where each evaluation lies in the batch; empty when it cannot be told."""
        return slices(self.x.shape[0], len(self.evaluations))


class RunState(Protocol):
    """What a side of MagCache keeps and does during one run."""

    clock: StepClock

    def guided(self, x: Tensor, timestep: Tensor, predict: Callable[[], Tensor]) -> Tensor:
        """The guided prediction (B, C, ...) for `x` at the noise levels `timestep` (B,), which is
        what `predict` gives."""

    def applied(self, call: ModelCall) -> Tensor:
        """The denoised latents of a call."""


def computed(call: ModelCall, sigma: float, blocks: list[BlockKey]) -> tuple[Tensor, Tensor | None]:
    """The denoised latents of a call at noise level `sigma`, and their residual.

    That of the stack of `blocks` (B, L, D), None when the model passed it by; without blocks the
    velocity (B, C, ...) of the whole model.
    """
    if not blocks:
        denoised = call.compute(call.options)
        return denoised, velocity(call.x, denoised, sigma)
    stack = StackMeasure(blocks)
    denoised = call.compute(with_hooks(call.options, stack.hooks()))
    return denoised, stack.residual


def put_on(
    model: ModelPatcher, side: str, measure: str, outer_sample: Callable[..., Tensor]
) -> ModelPatcher:
    """A clone of `model` with the wrappers of `side`, and no other MagCache.

    `outer_sample` does each run within `running`. ValueError when another cache is on the model,
    or when it has no hooks for what is to be measured.
    """
    refuse_rivals(model.model_options)
    measured_blocks(model, measure)
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, functools.partial(_predict_noise, side)),
        (WrappersMP.APPLY_MODEL, functools.partial(_apply_model, side)),
    ):
        for earlier in (CACHE, CALIBRATE):
            patched.remove_wrappers_with_key(kind, earlier)
        patched.add_wrapper_with_key(kind, side, wrapper)
    return patched


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


@contextlib.contextmanager
def running(guider: comfy.samplers.CFGGuider, side: str, run: RunState) -> Iterator[None]:
    """While it lasts, the wrappers of `side` act for `run` in everything that `guider` does."""
    original = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(original)
    guider.model_options.setdefault("transformer_options", {})[side] = run
    try:
        yield
    finally:
        guider.model_options = original


def _predict_noise(
    side: str,
    executor: WrapperExecutor,
    x: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> Tensor:
    options = model_options or {}
    run: RunState | None = options.get("transformer_options", {}).get(side)
    if run is None:
        return executor(x, timestep, options, seed)
    return run.guided(x, timestep, lambda: executor(x, timestep, options, seed))


def _apply_model(
    side: str,
    executor: WrapperExecutor,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    options = dict(transformer_options or {})
    run: RunState | None = options.pop(side, None)

    def compute(options: dict[str, Any]) -> Tensor:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    if run is None or "uuids" not in options:
        return compute(options)
    hooks = executor.class_obj.current_patcher.current_hooks
    return run.applied(
        ModelCall(
            x=x,
            options=options,
            evaluations=evaluations_of(options, x, run.clock.seen),
            disturbed=control is not None or hooks is not None,
            compute=compute,
        )
    )


def evaluations_of(
    options: dict[str, Any], x: Tensor, seen: dict[Hashable, int]
) -> list[Evaluation]:
    """What the batch `x` consists of: which conditioning, on what, and how often by now.

    A uuid alone does not tell: core gives a regional prompt's uuid to the negative it makes for
    its area, guidance nodes evaluate a conditioning twice in a step with other options, and
    context windows evaluate it on other frames. `seen` counts within one call of the guider.
    """
    window = options.get("context_window")
    frames = tuple(window.index_list) if window is not None else ()
    uuids = options["uuids"]
    tensor = (x.shape[0] / max(len(uuids), 1), x.shape[1:], x.dtype, x.device)
    found = []
    for index, uuid in zip(options["cond_or_uncond"], uuids, strict=True):
        who = (index, uuid, frames, tensor)
        seen[who] = seen.get(who, 0) + 1
        found.append(Evaluation(*who, turn=seen[who]))
    return found
