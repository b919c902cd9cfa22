"""The loss weight of a sample as a function of its own noise level t."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST_SIGMA = 1e-3
"""sigma_sqrt stops growing here (weight 1e6), the last step of musubi's 1000-step table."""


def constant(t: Tensor) -> Tensor:
    """1 for every noise level."""
    return torch.ones_like(t)


def sigma_sqrt(t: Tensor) -> Tensor:
    """sigma^-2, under the name that diffusers and musubi-tuner give it."""
    return t.clamp(min=SMALLEST_SIGMA) ** -2


def cosmap(t: Tensor) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)) (Esser et al. 2024, arXiv:2403.03206, section 3.1)."""
    return 2.0 / (math.pi * (1.0 - 2.0 * t + 2.0 * t * t))


LOSS_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": constant,
    "sigma_sqrt": sigma_sqrt,
    "cosmap": cosmap,
}
