"""TrainingJob: everything that a run is told, as one value that can be written down and read back.

The model and the data are references; what they refer to travels beside the job.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..disk.reading import parse_json
from ..document import object_from
from ..network.spec import NetworkSpec
from ..refusals import shortened
from ..timesteps.sampling import TimestepSampling
from .optimizers.optimizer import OptimizerSpec
from .options import Checkpointing, Compilation, Preview, TrainingLog, Validation
from .plan import TrainingPlan

DEEPEST = 8
"""Brackets in each other; a job has four."""
SCHEMA = 1
"""Of the JSON form; raised when a field changes its meaning, not when one is added."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReference:
    """The model that a job trains on."""

    file: str | None
    """Name of the file that it was loaded from; None where the loader left no word of it."""
    architecture: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReference:
    """The items that a job trains on, or measures."""

    items: int
    fingerprint: str
    """`identity.fingerprint` of the items in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """What a run is told; equal jobs on equal models and data give equal adapters."""

    plan: TrainingPlan
    network: NetworkSpec
    timesteps: TimestepSampling
    optimizer: OptimizerSpec
    model: ModelReference
    data: DataReference
    held_out: DataReference | None = None
    """The items of `validation`."""
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    log: TrainingLog | None = None
    compilation: Compilation | None = None
    preview: Preview | None = None
    validation: Validation | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(
                f"this training job has schema {self.schema}, this Braid reads {SCHEMA}; "
                "save the job again with this version"
            )

    @property
    def name(self) -> str:
        """Of the adapter file, without folders and ending."""
        return Path(self.plan.output_name).name

    def to_json(self) -> str:
        """The job as JSON, every field under its name; the optimizer by its type alone."""
        fields = asdict(self)
        del fields["optimizer"]["optimizer_class"]  # the list and the owner say
        return json.dumps(fields, indent=1, default=Path.as_posix)

    @staticmethod
    def from_json(text: str | bytes) -> "TrainingJob":
        """The job that `to_json` wrote; ValueError in one sentence for anything else."""
        try:
            given = parse_json(text, DEEPEST)
            _refuse_a_class(given)
            job = object_from(TrainingJob, given)
        except ValueError as error:
            raise ValueError(f"this is not a training job: {error}; save the job again") from error
        if unknown := _unknown(given, json.loads(job.to_json())):
            raise ValueError(
                f"this is not a training job of this version: it has {unknown}, which no job has; "
                "save the job again"
            )
        optimizer = replace(
            job.optimizer,
            optimizer_args=_with_tuples(job.optimizer.optimizer_args),
            lr_scheduler_args=_with_tuples(job.optimizer.lr_scheduler_args),
        )
        return replace(job, optimizer=optimizer)


def _refuse_a_class(given: Any) -> None:
    """A file names no code: which class an optimizer is, the list and the server's owner say."""
    optimizer = given.get("optimizer") if isinstance(given, dict) else None
    if isinstance(optimizer, dict) and "optimizer_class" in optimizer:
        raise ValueError("optimizer_class is not read from a file")


def _unknown(given: Any, known: Any, prefix: str = "") -> str:
    """The first name in nested JSON that its reader has not taken; "" for none."""
    if not (isinstance(given, dict) and isinstance(known, dict)):
        return ""
    for name, value in given.items():
        if name not in known:
            return shortened(f"{prefix}{name}")
        if deeper := _unknown(value, known[name], f"{prefix}{name}."):
            return deeper
    return ""


def _with_tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples, and optimizers that take betas=(0.9, 0.99) are given no list."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
    }
