"""What a run has seen so far: one record per optimizer step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """The figures of one optimizer step."""

    step: int
    """Steps done after it, from 1."""
    loss: float
    """Mean over the step's samples, weighted as the optimizer saw it."""
    gradient_norm: float
    """Joint norm of all gradients before clipping."""
    learning_rates: tuple[float, ...]
    """The rate each parameter group was stepped with."""
    timesteps: tuple[float, ...]
    """Noise level t of each sample."""
    sample_losses: tuple[float, ...]
    """Unweighted loss of each sample, in the same order."""
    weight_norms: tuple[float, ...] = ()
    """With scale_weight_norms: layers scaled down, mean and largest norm afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRecord:
    """Held-out loss after one step."""

    step: int
    loss: float
    bins: tuple[float, ...]
    """Mean loss in equal bins of the noise level t over [0, 1]."""


@dataclass(slots=True)
class LossHistory:
    """Every record of a run, resumed parts included."""

    records: list[StepRecord] = field(default_factory=list)
    validations: list[ValidationRecord] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]

    def average(self, window: int) -> float:
        """Mean loss of the last `window` steps, those that diverged left out; NaN without any."""
        return self.average_until(len(self.records), window)

    def average_until(self, count: int, window: int) -> float:
        """The same, when only the first `count` steps had been done."""
        last = [record.loss for record in self.records[max(0, count - window) : count]]
        finite = [loss for loss in last if math.isfinite(loss)]
        return sum(finite) / len(finite) if finite else math.nan

    def loss_map(self) -> dict[str, Any]:
        """Core's LOSS_MAP ("loss", one per step), the drawn timesteps and their losses added."""
        return {
            "loss": self.losses,
            "timesteps": [t for record in self.records for t in record.timesteps],
            "timestep_losses": [x for record in self.records for x in record.sample_losses],
            "validation_steps": [record.step for record in self.validations],
            "validation_loss": [record.loss for record in self.validations],
            "validation_bins": [list(record.bins) for record in self.validations],
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Float64 tensors that hold every number exactly."""
        counts = [len(record.timesteps) for record in self.records]
        return {
            "records": _table([(r.step, r.loss, r.gradient_norm) for r in self.records], 3),
            "learning_rates": _table([r.learning_rates for r in self.records], None),
            "weight_norms": _table([r.weight_norms for r in self.records], None),
            "sample_counts": torch.tensor(counts, dtype=torch.int64),
            "samples": _table(
                [
                    pair
                    for r in self.records
                    for pair in zip(r.timesteps, r.sample_losses, strict=True)
                ],
                2,
            ),
            "validations": _table([(v.step, v.loss, *v.bins) for v in self.validations], None),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "LossHistory":
        """What `state_dict` was taken of; ValueError names the table that does not fit."""
        _check_tables(state)
        samples = torch.split(state["samples"], state["sample_counts"].tolist())
        records = [
            StepRecord(
                step=int(step),
                loss=loss,
                gradient_norm=norm,
                learning_rates=tuple(rates),
                timesteps=tuple(mine[:, 0].tolist()),
                sample_losses=tuple(mine[:, 1].tolist()),
                weight_norms=tuple(norms),
            )
            for (step, loss, norm), rates, norms, mine in zip(
                state["records"].tolist(),
                state["learning_rates"].tolist(),
                state["weight_norms"].tolist(),
                samples,
                strict=True,
            )
        ]
        validations = [
            ValidationRecord(step=int(step), loss=loss, bins=tuple(bins))
            for step, loss, *bins in state["validations"].tolist()
        ]
        return cls(records, validations)


def _check_tables(state: Mapping[str, Any]) -> None:
    tables: dict[str, Tensor] = {}
    for name in LossHistory().state_dict():
        table = state.get(name)
        dtype, sides = (torch.int64, 1) if name == "sample_counts" else (torch.float64, 2)
        if not isinstance(table, Tensor) or table.dtype != dtype or table.ndim != sides:
            raise ValueError(f"history: its {name} are no table of numbers")
        tables[name] = table
    count = len(tables["records"])
    counts, samples, validations = (
        tables[name] for name in ("sample_counts", "samples", "validations")
    )
    fits = (
        tables["records"].shape == (count, 3)
        and all(len(tables[n]) == count for n in ("learning_rates", "weight_norms"))
        and counts.shape == (count,)
        and samples.shape == (len(samples), 2)
        and (len(validations) == 0 or validations.shape[1] >= 2)
    )
    if not fits or bool((counts < 0).any()) or sum(counts.tolist()) != len(samples):
        raise ValueError("history: its tables are of different lengths")
    steps = torch.cat([tables["records"][:, 0], validations[:, :1].flatten()])
    if not bool((steps.isfinite() & (steps.abs() < 2**53)).all()):
        raise ValueError("history: it holds a step that is no number")


def _table(rows: list[tuple[float, ...]], columns: int | None) -> Tensor:
    width = columns if columns is not None else (len(rows[0]) if rows else 0)
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)
