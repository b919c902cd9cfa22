"""TrainingPlan: how long, how fast, in which precision, from which seed."""

import math
from dataclasses import dataclass

from ..names import FORBIDDEN_IN_NAMES, check_typed_path

LOSS_TYPES = ("mse", "huber", "smooth_l1")
MIXED_PRECISIONS = ("bf16", "fp16", "no")
MAX_STEPS = 1_000_000
"""Of one run; a linked node may give any number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """The settings of one run that are neither network, noise levels nor optimizer."""

    steps: int
    """Optimizer steps of the whole run, resumed parts included."""
    batch_size: int = 1
    """Items per forward pass; items of different shape never share a batch."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step."""
    learning_rate: float = 1e-4
    seed: int = 0
    """Of data order, noise, timesteps, dropout and the adapter's start values."""
    output_name: str = "lora"
    """File name of the adapter without ending; may hold sub-folders."""
    mixed_precision: str = "bf16"
    """Compute type of the base model: bf16, fp16, or no (its own type)."""
    gradient_checkpointing: bool = True
    """Recompute each block in backward: about a third more time for far less memory."""
    loss_type: str = "mse"
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this joint norm; 0 = off."""
    scale_weight_norms: float = 0.0
    """Largest Frobenius norm of one module's update; 0 = off."""
    blocks_to_swap: int = 0
    """Blocks whose weights stay in main memory and visit the device one by one."""
    guidance: float = 1.0
    """Distilled guidance given to models that take one (FLUX dev, HunyuanVideo)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.steps > MAX_STEPS:
            raise ValueError(f"steps is {self.steps}; it must be at most {MAX_STEPS}")
        for name in ("max_grad_norm", "scale_weight_norms", "blocks_to_swap", "seed", "guidance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (off) or more")
        if not 0 < self.learning_rate < 100:
            raise ValueError(
                f"learning_rate is {self.learning_rate}; it must be above 0 (1e-4 is usual)"
            )
        for name, allowed in (
            ("mixed_precision", MIXED_PRECISIONS),
            ("loss_type", LOSS_TYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )
        self._check_output_name()

    def _check_output_name(self) -> None:
        check_typed_path("output_name", self.output_name)
        parts = self.output_name.split("/")
        if not self.output_name.strip() or any(p.strip() in ("", ".", "..") for p in parts):
            raise ValueError(
                f"output_name is {self.output_name!r}; give a file name such as my_lora, "
                "with / for sub-folders and without .."
            )
        if any(sign in self.output_name for sign in FORBIDDEN_IN_NAMES):
            raise ValueError(
                f"output_name is {self.output_name!r}; file names cannot hold any of "
                '< > : " | ? * or a backslash'
            )
