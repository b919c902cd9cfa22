"""The adapter files of one run, in the order they were trained."""

from dataclasses import dataclass
from pathlib import Path


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
