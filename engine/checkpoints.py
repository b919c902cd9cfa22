"""The adapter files of one run, in the order they were trained, and an adapter held in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One saved adapter file."""

    path: Path
    step: int | None
    """Optimizer steps done when it was saved; None when neither metadata nor name say so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """Adapter files, oldest first (socket BRAID_CHECKPOINTS)."""

    files: tuple[Checkpoint, ...]
    shadows: Path | None = None
    """The EMA shadow file of the run, when it kept shadows."""


class AdapterStateDict(dict[str, Tensor]):
    """A LORA_MODEL: the tensors of an adapter file, which remember what made them.

    To ComfyUI's own nodes it is the plain dict that they expect.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)
        """What Braid's Save LoRA writes into the file."""
