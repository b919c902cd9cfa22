"""TrainingOptions: what a run does besides training; each part is optional, nodes chain them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..refusals import refuse_below, refuse_other

Step = TypeVar("Step")
LOG_TARGETS = ("tensorboard", "wandb", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpointing:
    """When and what to save while training."""

    save_every_n_steps: int = 0
    """0 = only the final adapter."""
    save_last_n: int = 0
    """How many step checkpoints are kept, a count; 0 = all. The best one is always kept."""
    save_state: bool = False
    """Also save what `resume` needs: optimizer, schedule, order, history."""
    ema_shadows: bool = False
    """Keep five running averages, from which any EMA width can be rebuilt afterwards."""
    resume: str = ""
    """State file to go on from: a path, "latest" of this output_name, or "" to start afresh."""

    def __post_init__(self) -> None:
        for name in ("save_every_n_steps", "save_last_n"):
            refuse_below(name, getattr(self, name), 0, "off")

    def saving_steps(self, steps: int) -> range:
        """The steps after which a run of `steps` saves its adapter."""
        every = self.save_every_n_steps
        return range(every, steps + 1, every) if every else range(0)

    def kept(self, saved: Sequence[Step]) -> Sequence[Step]:
        """Those of the `saved` steps, oldest first, whose files stay; the best one stays too."""
        return saved[-self.save_last_n :] if self.save_last_n else saved


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLog:
    """Where the figures of a run go."""

    log_with: str
    """tensorboard, wandb or all."""
    logging_dir: Path
    log_prefix: str = ""
    """Before the date in the folder name of the run."""
    log_tracker_name: str = "network_train"
    """TensorBoard sub-folder and W&B project."""
    wandb_run_name: str = ""

    def __post_init__(self) -> None:
        refuse_other("log_with", self.log_with, LOG_TARGETS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compilation:
    """torch.compile of each block while training."""

    dynamo_backend: str = "inductor"
    dynamo_mode: str = "default"
    dynamo_fullgraph: bool = False
    dynamo_dynamic: bool | None = None
    """None lets torch decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """When pictures are sampled while training."""

    every_n_steps: int

    def __post_init__(self) -> None:
        refuse_below("sample_every_n_steps", self.every_n_steps, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """When the loss on held-out items is measured, at the same noise and levels every time."""

    every_n_steps: int
    timesteps_per_item: int = 8
    """Noise levels per item, evenly spread over the run's own distribution."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "timesteps_per_item"):
            refuse_below(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The items of `validation`, as the host gives them for training."""

    latents: Sequence[Any]
    conditioning: Sequence[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """Socket BRAID_TRAINING_OPTIONS: what a run is told besides training, and with which values."""

    checkpointing: Checkpointing | None = None
    log: TrainingLog | None = None
    compilation: Compilation | None = None
    preview: Preview | None = None
    validation: Validation | None = None
    preview_sampling: Any = None
    """What the host needs to sample `preview`: latent, prompts, sampler, sigmas, cfg, seed, VAE."""
    held_out: HeldOut | None = None

    def adding(self, **parts: Any) -> "TrainingOptions":
        """A copy with one more option; ValueError when the chain already has it."""
        for name in parts:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"the chain of options holds {name} twice; remove one of the two nodes"
                )
        return replace(self, **parts)
