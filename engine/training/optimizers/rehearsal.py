"""A run's optimizer and schedule, tried out on throw-away parameters before any work starts."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...refusals import said, shortened
from .optimizer import Optimization, OptimizerSpec, defaults_said

logger = logging.getLogger("comfyui_braid.training")

STEPS = 3
LONGEST_SIDE = 8
LARGEST_WEIGHT = 1e6
"""After those steps; learning_rate 10 with a loraplus_lr_ratio of 1024 comes to 3e4."""
MOST_CALLS = 100_000
"""Into torch, for all steps: of 183 optimizers SpectralSphere makes 31,766, the others 1,184."""


def rehearse(spec: OptimizerSpec, groups: Sequence[Mapping[str, Any]], steps: int) -> None:
    """ValueError, in one sentence, for settings that would break the run's first steps.

    groups: as `Optimization` takes them, on the run's device; what they hold is left as it is, and
    so is every random state. steps: of the whole run.
    """
    if spec.finds_its_own_rate and groups[0]["lr"] < 0.1:
        logger.warning(
            "%s multiplies the rate it finds by learning_rate, usually 1.0; here it is %g",
            spec.optimizer_type,
            groups[0]["lr"],
        )
    device = groups[0]["params"][0].device
    with _random_states_kept(device), torch.inference_mode(False), torch.enable_grad():
        small = [{**group, "params": _miniatures(group["params"])} for group in groups]
        optimization = Optimization(spec, small, steps)
        try:
            with _uncompiled(), _Bounded():
                for _ in range(STEPS):
                    _take_a_step(optimization)
        except (Exception, SystemExit) as error:  # whatever somebody else's optimizer does
            given = shortened(str(dict(spec.optimizer_args)), 200)
            raise ValueError(
                f"{spec.optimizer_type} with the optimizer_args {given} cannot train a LoRA "
                f"({said(error)}); change them, or choose another optimizer"
                f"{defaults_said(type(optimization.optimizer), spec.optimizer_args)}"
            ) from error


def _take_a_step(optimization: Optimization) -> None:
    parameters = [p for group in optimization.optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = _ramp(parameter.shape, parameter.device)
    optimization.optimizer.step()
    optimization.advance()
    largest = max(float(parameter.detach().abs().max()) for parameter in parameters)
    if not largest < LARGEST_WEIGHT:
        raise ValueError(f"its first steps take weights of 0.1 to {largest:g}")


def _miniatures(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """One parameter of every shape that there is once each side is cut to LONGEST_SIDE."""
    shapes = {tuple(min(n, LONGEST_SIDE) for n in p.shape): p.device for p in parameters}
    return [nn.Parameter(_ramp(shape, device)) for shape, device in shapes.items()]


def _ramp(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Values from -0.1 to 0.1."""
    return torch.linspace(-0.1, 0.1, torch.Size(shape).numel(), device=device).reshape(shape)


def _uncompiled() -> AbstractContextManager[None]:
    """Inside, steps that torchao and bitsandbytes compile run as they are written: at once."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # from torch 2.6 on
    return set_stance("force_eager") if set_stance else nullcontext()


class _Bounded(TorchFunctionMode):
    """Inside, MOST_CALLS into torch are allowed: ns_steps=10**9 would hold the queue for hours."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._calls += 1
        if self._calls > MOST_CALLS:
            raise ValueError(f"{STEPS} steps on a tiny LoRA take over {MOST_CALLS} operations")
        return func(*args, **(kwargs or {}))


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """What optimizers draw from: torch, numpy and the standard library."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type != "cpu" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
