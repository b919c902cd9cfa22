"""One run under the cache: what it remembers and decides, and the report of what it did."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .clock import StepClock
from .residuals import ConditioningNames, Evaluation, ResidualCache
from .schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningCount:
    """Which steps of one conditioning were computed and which predicted."""

    label: str
    """`positive`, `negative`, `positive 2` …"""
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
    """In the order in which they appeared."""
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


class Run:
    """Everything one sampling run remembers; dropped when the run ends."""

    def __init__(self, schedule: Schedule, clock: StepClock) -> None:
        self.clock = clock
        self.cache = ResidualCache(schedule.extrapolate)
        self._schedule = schedule
        self._predicted_from = schedule.predicted_from
        self._names = ConditioningNames()
        self._computed: dict[str, list[int]] = {}
        self._predicted: dict[str, list[int]] = {}

    def may_skip(self, evaluations: Sequence[Evaluation]) -> bool:
        """True when the schedule skips this step and every conditioning has a residual of the step
        that the schedule counts on; an older one would say little."""
        base = self._predicted_from.get(self.clock.step)
        return base is not None and all(self.cache.holds(each, base) for each in evaluations)

    @property
    def remembers(self) -> bool:
        """True when what is computed now may be needed later."""
        return bool(self._predicted_from) and self.clock.on_schedule and self.clock.sigma > 0

    def note(self, evaluations: Sequence[Evaluation], skipped: bool) -> None:
        """Count a call of the model for the report."""
        into = self._predicted if skipped else self._computed
        for evaluation in evaluations:
            into.setdefault(self._names.name(evaluation), []).append(self.clock.step)

    def report(self, seconds: float) -> RunReport:
        """What was computed and what predicted, in `seconds` of wall time."""
        names = dict.fromkeys([*self._computed, *self._predicted])
        return RunReport(
            schedule=self._schedule,
            conditionings=tuple(
                ConditioningCount(
                    label=name,
                    computed=tuple(self._computed.get(name, ())),
                    skipped=tuple(self._predicted.get(name, ())),
                )
                for name in names
            ),
            seconds=seconds,
        )
