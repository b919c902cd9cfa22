"""Learning-rate schedules: transformers' own, and rex."""

import functools
from collections.abc import Mapping
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
    """The schedule called `name` over `steps` optimizer steps."""
    if name == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    if name == "rex":
        unknown = [key for key in arguments if key not in REX_ARGUMENTS]
        if unknown:
            raise ValueError(
                f"lr_scheduler_args: rex does not know {', '.join(unknown)}; "
                f"it takes {', '.join(REX_ARGUMENTS)}"
            )
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
        from transformers import get_scheduler
    except ImportError as error:
        raise ValueError(
            f"lr_scheduler {name} comes from the package transformers, which is not installed "
            "here: pip install transformers"
        ) from error
    if name == "warmup_stable_decay":
        arguments.setdefault("num_decay_steps", max(1, steps // 5))
    if name == "cosine_with_min_lr" and not arguments.keys() & {"min_lr", "min_lr_rate"}:
        arguments["min_lr_rate"] = arguments.pop("min_lr_ratio", 0.1)
    try:
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_args: {name} refuses {arguments} ({error}); leave lr_scheduler_args "
            "empty, or see transformers' page of that schedule"
        ) from error
