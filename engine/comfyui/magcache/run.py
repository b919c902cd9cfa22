"""One sampling run under MagCache: its state, and the two wrappers that act on every model call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...magcache.clock import StepClock
from ...magcache.residuals import (
    Key,
    ResidualCache,
    predicted_denoised,
    residual_on_line,
    slices,
    velocity,
)
from ...magcache.schedule import Schedule
from .blocks import BlockKey, StackMeasure, skipping_hooks, with_hooks

KEY = "braid.magcache"
Compute = Callable[[dict[str, Any]], Tensor]


def conditioning_keys(options: dict[str, Any], x: Tensor, calls: dict[Key, int]) -> list[Key]:
    """One key per conditioning of the batch `x`: which one it is, on what, and how often by now.

    A uuid alone does not tell: core gives a regional prompt's uuid to the negative it makes for
    its area, guidance nodes evaluate a conditioning twice in a step with other options, and
    context windows evaluate it on other frames. `calls` counts within one call of the guider.
    """
    window = options.get("context_window")
    frames = tuple(window.index_list) if window is not None else ()
    uuids = options["uuids"]
    tensor = (x.shape[0] / max(len(uuids), 1), x.shape[1:], x.dtype, x.device)
    keys = []
    for index, uuid in zip(options["cond_or_uncond"], uuids, strict=True):
        who = (index, uuid, frames, tensor)
        calls[who] = calls.get(who, 0) + 1
        keys.append((*who, calls[who]))
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
    blocks: list[BlockKey]
    """Keys of the block stack when measuring blocks, else empty."""
    clock: StepClock
    cache: ResidualCache
    predicted_from: dict[int, int]
    """Each step to be skipped -> the computed step before it."""
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
        """True when the schedule skips this step and every conditioning has a residual of the step
        that the schedule counts on; an older one would say little."""
        base = self.predicted_from.get(self.step)
        return (
            base is not None
            and bool(slices(x.shape[0], len(keys)))
            and all(self.cache.holds(key, base) for key in keys)
        )

    @property
    def remembers(self) -> bool:
        """True when what is computed now may be needed later."""
        return bool(self.predicted_from) and self.on_schedule and self.sigma > 0

    def note(self, keys: list[Key], options: dict[str, Any], skipped: bool) -> None:
        """Count the call for the report."""
        into = self.predicted if skipped else self.computed
        for key, index in zip(keys, options["cond_or_uncond"], strict=True):
            into.setdefault(self.names.name(key, index), []).append(self.step)


def predict_noise(executor, x, timestep, model_options=None, seed=None):
    """PREDICT_NOISE wrapper: one model call of the sampler."""
    model_options = model_options or {}
    run = model_options.get("transformer_options", {}).get(KEY)
    if run is not None:
        run.tick(timestep)
    return executor(x, timestep, model_options, seed)


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
    """APPLY_MODEL wrapper: denoised latents of a batch of conditionings, computed or predicted."""
    options = transformer_options or {}
    run = options.get(KEY)
    options = {key: value for key, value in options.items() if key != KEY}

    def compute(options: dict[str, Any]) -> Tensor:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    if run is None or "uuids" not in options:
        return compute(options)
    keys = conditioning_keys(options, x, run.calls)
    if control is not None or executor.class_obj.current_patcher.current_hooks is not None:
        for key in keys:  # what it computes changes from step to step for other reasons
            run.cache.drop(key)
        run.note(keys, options, skipped=False)
        return compute(options)
    through = _blocks if run.blocks else _latent
    return through(run, keys, x, options, compute)


def _latent(
    run: Run, keys: list[Key], x: Tensor, options: dict[str, Any], compute: Compute
) -> Tensor:
    skip = run.may_skip(keys, x)
    run.note(keys, options, skip)
    if skip:
        return predicted_denoised(run.cache, keys, x, run.sigma)
    denoised = compute(options)
    if run.remembers:
        residual = velocity(x, denoised, run.sigma)
        for key, part in zip(keys, slices(x.shape[0], len(keys)), strict=False):
            run.cache.store(key, run.step, run.sigma, residual[part])
    return denoised


def _blocks(
    run: Run, keys: list[Key], x: Tensor, options: dict[str, Any], compute: Compute
) -> Tensor:
    """As `_latent`, for the residual of the block stack; embedding and output layers always run."""
    parts = slices(x.shape[0], len(keys))
    patched_between = {"double_block", "single_block"} & set(options.get("patches", {}))
    skip = not patched_between and run.may_skip(keys, x)
    run.note(keys, options, skip)
    if skip:
        return compute(with_hooks(options, skipping_hooks(run.blocks, _residual_for(run, keys))))
    if not (run.remembers and parts):
        return compute(options)
    measure = StackMeasure(run.blocks)
    denoised = compute(with_hooks(options, measure.hooks()))
    residual = measure.residual
    if residual is not None:
        for key, part in zip(keys, parts, strict=True):
            run.cache.store(key, run.step, run.sigma, residual[part])
    return denoised


def _residual_for(run: Run, keys: list[Key]) -> Callable[[Tensor], Tensor]:
    def residual_for(hidden: Tensor) -> Tensor:
        out = torch.empty_like(hidden)
        for key, part in zip(keys, slices(hidden.shape[0], len(keys)), strict=True):
            newest, before, w = run.cache.line(key, run.sigma)
            residual_on_line(newest.residual, before.residual if before else None, w, out[part])
        return out

    return residual_for
