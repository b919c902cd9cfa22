"""Learning-rate schedules: transformers' own, and rex."""

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

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
REX_ARGUMENTS = ("rex_alpha", "rex_beta", "min_lr_ratio")


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
    if name == "constant":
        _refuse_unknown(name, arguments, ())
        return LambdaLR(optimizer, lambda step: 1.0)
    if name == "rex":
        _refuse_unknown(name, arguments, REX_ARGUMENTS)
        factor = functools.partial(rex, steps=steps, warmup_steps=warmup_steps, **arguments)
        return LambdaLR(optimizer, factor)
    return _from_transformers(optimizer, name, steps, warmup_steps, dict(arguments))


def _from_transformers(
    optimizer: torch.optim.Optimizer,
    name: str,
    steps: int,
    warmup_steps: int,
    arguments: dict[str, Any],
) -> LambdaLR:
    try:
        from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    except ImportError as error:
        raise ValueError(
            f"lr_scheduler {name} comes from the package transformers, which is not installed "
            "here: pip install transformers"
        ) from error
    build = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}[name]
    given = {
        "optimizer": optimizer,
        "num_warmup_steps": warmup_steps,
        "num_training_steps": steps,
    }
    # called by name and not through get_scheduler, which drops what some of them take
    takes = inspect.signature(build).parameters
    _refuse_unknown(name, arguments, [key for key in takes if key not in (*given, "last_epoch")])
    if name == "warmup_stable_decay" and "num_stable_steps" not in arguments:
        arguments.setdefault("num_decay_steps", max(1, steps // 5))
    if name == "cosine_with_min_lr" and not arguments.keys() & {"min_lr", "min_lr_rate"}:
        arguments["min_lr_rate"] = 0.1
    try:
        return build(**{k: v for k, v in given.items() if k in takes}, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_args: {name} refuses {arguments} ({error})") from error


def _refuse_unknown(name: str, arguments: Mapping[str, Any], known: Collection[str]) -> None:
    for key in arguments:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
            raise ValueError(f"lr_scheduler_args: {name} does not know {key}; {takes}")
