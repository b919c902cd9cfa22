"""What a run with MagCache did."""

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
    """What was to be skipped; what could not be predicted was computed all the same."""
    conditionings: tuple[ConditioningCount, ...]
    seconds: float
    """Wall time of the sampler."""

    @property
    def evaluations(self) -> int:
        """Model evaluations of all conditionings."""
        return sum(len(count.computed) for count in self.conditionings)

    @property
    def skipped_steps(self) -> tuple[int, ...]:
        """Steps for which the network did not run at all, rising."""
        computed = {step for count in self.conditionings for step in count.computed}
        predicted = {step for count in self.conditionings for step in count.skipped}
        return tuple(sorted(predicted - computed))

    @property
    def speedup(self) -> float:
        """Evaluations that a run without cache makes, over those made."""
        everything = sum(len(c.computed) + len(c.skipped) for c in self.conditionings)
        return everything / max(self.evaluations, 1)

    def line(self) -> str:
        """One sentence for the log."""
        steps = self.schedule.steps
        return (
            f"MagCache: {steps - len(self.skipped_steps)} of {steps} steps computed, "
            f"{self.evaluations} evaluations, {self.speedup:.2f}x fewer, {self.seconds:.2f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as the node's JSON."""
        schedule = self.schedule
        return {
            "steps": schedule.steps,
            "computed_steps": schedule.steps - len(self.skipped_steps),
            "skipped_steps": list(self.skipped_steps),
            "evaluations": self.evaluations,
            "speedup": round(self.speedup, 4),
            "seconds": round(self.seconds, 4),
            "conditionings": {
                count.label: {"computed": list(count.computed), "skipped": list(count.skipped)}
                for count in self.conditionings
            },
            "warnings": list(schedule.warnings),
        }


def schedule_dict(schedule: Schedule) -> dict[str, Any]:
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
        "warnings": list(schedule.warnings),
    }
