"""What a run with MagCache did."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningCount:
    """Which steps of one conditioning were computed and which predicted."""

    label: str
    computed: tuple[int, ...]
    """Step index of every model evaluation."""
    skipped: tuple[int, ...]
    """Step index of every prediction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """A finished run."""

    schedule: Schedule
    conditionings: tuple[ConditioningCount, ...]
    seconds: float
    """Wall time of the sampler."""

    @property
    def evaluations(self) -> int:
        """Model evaluations of all conditionings."""
        return sum(len(count.computed) for count in self.conditionings)

    @property
    def speedup(self) -> float:
        """Evaluations that a run without cache makes, over those made."""
        everything = sum(len(c.computed) + len(c.skipped) for c in self.conditionings)
        return everything / max(self.evaluations, 1)

    def line(self) -> str:
        """One sentence for the log."""
        schedule = self.schedule
        return (
            f"MagCache: {schedule.computed} of {schedule.steps} steps computed, "
            f"{self.evaluations} evaluations, {self.speedup:.2f}x fewer, {self.seconds:.2f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as the node's JSON."""
        schedule = self.schedule
        return {
            "steps": schedule.steps,
            "computed_steps": schedule.computed,
            "skipped_steps": list(schedule.skipped),
            "evaluations": self.evaluations,
            "speedup": round(self.speedup, 4),
            "seconds": round(self.seconds, 4),
            "conditionings": {
                count.label: {"computed": list(count.computed), "skipped": list(count.skipped)}
                for count in self.conditionings
            },
            "warnings": list(schedule.warnings),
        }


def schedule_dict(schedule: Schedule, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """A schedule as the plan node's JSON and the live strip's numbers."""
    return {
        "steps": schedule.steps,
        "skipped": list(schedule.skipped),
        "computed": schedule.computed,
        "speedup": round(schedule.speedup, 4),
        "error": schedule.error,
        "predicted_rms": schedule.predicted_rms,
        "accumulated": [round(value, 8) for value in schedule.accumulated],
        "sigmas": [round(sigma, 6) for sigma in schedule.sigmas],
        "predict": "extrapolate" if schedule.extrapolate else "reuse",
        "warnings": [*schedule.warnings, *warnings],
    }
