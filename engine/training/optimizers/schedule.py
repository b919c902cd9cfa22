"""Learning-rate schedules: transformers' own, and rex."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ...refusals import did_you_mean, said, shortened

LR_SCHEDULERS = (
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant_with_warmup",
    "cosine_with_min_lr",
    "inverse_sqrt",
    "warmup_stable_decay",
    "rex",
)

MOST_TIMES_BASE = 100
"""A schedule may exceed the base rate (rex does, with a small rex_alpha + rex_beta), so far."""


def rex(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    rex_alpha: float = 0.1,
    rex_beta: float = 0.9,
    min_lr_ratio: float = 0.01,
) -> float:
    """The rate at `step` (from 0) over the base rate: budgeted decay of arXiv 2107.04197.

    With z the share of the steps after warm-up that is left, m + (1 - m) z / (alpha + beta z).
    Warm-up rises in a line from m to 1 and reaches 1 at step `warmup_steps`, in every group alike.
    """
    if step < warmup_steps:
        return min_lr_ratio + (1 - min_lr_ratio) * step / warmup_steps
    left = max(0.0, 1 - (step - warmup_steps) / max(1, steps - warmup_steps))
    if left == 0:
        return min_lr_ratio  # with rex_alpha 0 too, where the quotient is 0 / 0
    return min_lr_ratio + (1 - min_lr_ratio) * left / (rex_alpha + rex_beta * left)


def build_schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    steps: int,
    warmup_steps: int,
    arguments: Mapping[str, Any],
) -> LambdaLR:
    """The schedule called `name` over `steps` optimizer steps; ValueError for a wrong argument."""
    # transformers' functions are called by name and not through its get_scheduler, which drops
    # arguments that some of them take
    build = OWN_SCHEDULES.get(name) or _transformers_schedule(name)
    given = {
        "optimizer": optimizer,
        "num_warmup_steps": warmup_steps,
        "num_training_steps": steps,
    }
    takes = inspect.signature(build).parameters
    try:
        completed = _completed(name, arguments, steps, warmup_steps)
    except TypeError as error:
        raise _refused(name, arguments, error) from error
    _refuse_unknown(name, completed, [key for key in takes if key not in (*given, "last_epoch")])
    try:
        schedule = build(**{k: v for k, v in given.items() if k in takes}, **completed)
        _try_out(schedule, steps)
    except Exception as error:  # transformers' functions check little of what they are given
        raise _refused(name, completed, error) from error
    return schedule


def _refused(name: str, arguments: Mapping[str, Any], error: Exception) -> ValueError:
    given = shortened(str(dict(arguments)), 200)
    return ValueError(f"lr_scheduler_args: {name} refuses {given} ({said(error)})")


def _constant(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1.0)


def _rex(
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    rex_alpha: float = 0.1,
    rex_beta: float = 0.9,
    min_lr_ratio: float = 0.01,
) -> LambdaLR:
    factor = functools.partial(
        rex,
        steps=num_training_steps,
        warmup_steps=num_warmup_steps,
        rex_alpha=rex_alpha,
        rex_beta=rex_beta,
        min_lr_ratio=min_lr_ratio,
    )
    return LambdaLR(optimizer, factor)


OWN_SCHEDULES: dict[str, Callable[..., LambdaLR]] = {"constant": _constant, "rex": _rex}


def _transformers_schedule(name: str) -> Callable[..., LambdaLR]:
    try:
        from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    except ImportError as error:
        raise ValueError(
            f"lr_scheduler {name} comes from the package transformers, which is not installed "
            "here: pip install transformers"
        ) from error
    schedules: dict[str, Any] = {kind.value: f for kind, f in TYPE_TO_SCHEDULER_FUNCTION.items()}
    return schedules[name]


def _completed(
    name: str, arguments: Mapping[str, Any], steps: int, warmup_steps: int
) -> dict[str, Any]:
    """The arguments, with those that a schedule needs and the user need not give."""
    completed = dict(arguments)
    if name == "cosine_with_min_lr":
        if "min_lr_ratio" in completed:  # as musubi and the other schedules call it
            completed["min_lr_rate"] = completed.pop("min_lr_ratio")
        elif "min_lr" not in completed:
            completed.setdefault("min_lr_rate", 0.1)
    if name == "warmup_stable_decay":
        for key in completed.keys() & {"num_decay_steps", "num_stable_steps"}:
            completed[key] = _whole_steps(completed[key], steps)
        if "num_decay_steps" not in completed:
            stable = completed.pop("num_stable_steps", steps - warmup_steps - steps // 5)
            completed["num_decay_steps"] = max(1, steps - warmup_steps - stable)
    return completed


def _whole_steps(given: Any, steps: int) -> Any:
    """Below 1 a share of the run, as lr_warmup_steps is, and musubi's lr_decay_steps."""
    return int(given * steps) if isinstance(given, float) and 0 < given < 1 else given


def _try_out(schedule: LambdaLR, steps: int) -> None:
    """Raises now for a rate that would break the run in the middle: every step's is looked at."""
    for factor in set(schedule.lr_lambdas):
        for step in range(steps + 1):
            rate = factor(step)
            if isinstance(rate, complex) or not 0 <= rate <= MOST_TIMES_BASE:
                raise ValueError(
                    f"the rate at step {step} would be {rate} times the base rate; it must be "
                    f"from 0 to {MOST_TIMES_BASE} times"
                )


def _refuse_unknown(name: str, arguments: Mapping[str, Any], known: Collection[str]) -> None:
    for key in arguments:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
            guess = did_you_mean(key, known)
            raise ValueError(
                f"lr_scheduler_args: {name} does not know {shortened(key)}{guess}; {takes}"
            )
