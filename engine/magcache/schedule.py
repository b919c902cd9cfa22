"""From a plan and a run's noise levels to the steps it will skip; decided once, before it runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..texts import Text
from .curve import cumulative_ratios, falls, nearest_ratios, resampled_sigmas
from .plan import MagCachePlan
from .rules import MagCacheRule, PlannedRule, Rule, accumulated_errors
from .shortest_path import (
    Array,
    computed_steps,
    full_matrix,
    gathered_errors,
    interpolation_weights,
    jump_costs,
    least_error_paths,
    prediction_errors,
    reuse_error,
)

FEW_STEPS = 10
MAX_STEPS = 10_000
"""Steps of a run that a schedule is made for, as many as ComfyUI's samplers take."""
MAX_PLANNED_STEPS = 1_000
"""Steps whose prediction errors are weighed: they are compared pair by pair."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Which steps of one run are computed and which are predicted."""

    sigmas: tuple[float, ...]
    """The steps + 1 noise levels of the run."""
    skipped: tuple[int, ...]
    """Step indices that are not computed, rising."""
    accumulated: tuple[float, ...]
    """At every step the error gathered since the last computed one; 0 where it is computed. Sum of
    |1 - ratio| for the paper's rule, weighted RMS prediction error for a planned schedule."""
    error: float
    """Planned: predicted RMS error of the final latent (of the hidden state, for a calibration of
    blocks). Paper's rule: largest accumulated error."""
    predicted_rms: float | None
    """Predicted RMS error of the final latent in latent units; None without a calibration of it,
    or above MAX_PLANNED_STEPS."""
    planned: bool
    """True for the planned rule, False for the paper's."""
    extrapolate: bool
    """True when skipped steps lie on the line through the last two computed ones."""
    warnings: tuple[str, ...] = ()
    """Sentences for the user; those of plan_schedule are each a Text."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.sigmas) - 1

    @property
    def computed(self) -> int:
        """Number of steps that call the model."""
        return self.steps - len(self.skipped)

    @property
    def predicted_from(self) -> dict[int, int]:
        """Each skipped step -> the computed step before it."""
        return predicted_from(self.steps, self.skipped)

    @property
    def speedup(self) -> float:
        """Steps over computed steps."""
        return self.steps / max(self.computed, 1)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as the plan node's JSON and the live strip's numbers."""
        return {
            "steps": self.steps,
            "skipped": list(self.skipped),
            "computed": self.computed,
            "speedup": round(self.speedup, 4),
            "error": self.error,
            "predicted_rms": self.predicted_rms,
            "accumulated": [round(value, 8) for value in self.accumulated],
            "sigmas": [round(sigma, 6) for sigma in self.sigmas],
            "predict": "extrapolate" if self.extrapolate else "reuse",
            "warnings": list(self.warnings),
        }


def predicted_from(steps: int, skipped: Sequence[int]) -> dict[int, int]:
    """Each skipped step -> the computed step before it."""
    predicted, computed, found = set(skipped), 0, {}
    for step in range(steps):
        if step in predicted:
            found[step] = computed
        else:
            computed = step
    return found


def plan_schedule(
    plan: MagCachePlan,
    sigmas: Sequence[float],
    rule: Rule,
    allowed: Sequence[bool] | None = None,
    knots: Sequence[float] | None = None,
) -> Schedule:
    """The schedule of one run.

    `sigmas`: the run's steps + 1 noise levels; where they do not fall, as when noise is added back
    in mid-run, nothing is skipped. `allowed`: steps that may be (default all). `knots`: where the
    ratios of a plan without its own noise levels lie; by default the run's schedule resampled to
    the plan's number of steps. ValueError when `planned` has no calibration, and for more steps
    than MAX_STEPS, or MAX_PLANNED_STEPS of `planned`.
    """
    steps = len(sigmas) - 1
    sigmas = tuple(float(sigma) for sigma in sigmas)
    allowed = [True] * steps if allowed is None else list(allowed)
    warnings = list(_few_steps(steps, rule))
    if isinstance(rule, PlannedRule) and not plan.calibrated:
        sentence = Text(
            "rule 'planned' needs a calibration, and {name} is a list of ratios: run MagCache "
            "Calibrate once and connect its plan, or choose rule 'magcache'",
            name=repr(plan.name),
        )
        raise ValueError(sentence)
    if rule.off or steps < 2 or not any(allowed):
        return _nothing_skipped(sigmas, warnings)
    if not falls(sigmas):
        warnings.append(
            Text("the noise levels do not fall from step to step: every step is computed")
        )
        return _nothing_skipped(sigmas, warnings)
    _check_steps(steps, rule)
    if isinstance(rule, PlannedRule):
        return _planned(plan, sigmas, rule, allowed, warnings)
    return _magcache(plan, sigmas, rule, allowed, knots, warnings)


def _check_steps(steps: int, rule: Rule) -> None:
    if isinstance(rule, PlannedRule) and steps > MAX_PLANNED_STEPS:
        raise ValueError(
            f"rule 'planned' takes runs of up to {MAX_PLANNED_STEPS} steps, and this one has "
            f"{steps}: choose rule 'magcache', or fewer steps"
        )
    if steps > MAX_STEPS:
        raise ValueError(f"steps: got {steps}, MagCache takes runs of up to {MAX_STEPS}")


def _few_steps(steps: int, rule: Rule) -> list[str]:
    if steps > FEW_STEPS or rule.off:
        return []
    sentence = Text(
        "{steps} steps are few for a cache: compare with plain runs of fewer steps", steps=steps
    )
    return [sentence]


def _nothing_skipped(sigmas: tuple[float, ...], warnings: list[str]) -> Schedule:
    return Schedule(
        sigmas=sigmas,
        skipped=(),
        accumulated=(0.0,) * (len(sigmas) - 1),
        error=0.0,
        predicted_rms=0.0,
        planned=False,
        extrapolate=False,
        warnings=tuple(warnings),
    )


def run_ratios(
    plan: MagCachePlan,
    sigmas: Sequence[float],
    interpolation: str,
    knots: Sequence[float] | None = None,
) -> list[list[float]]:
    """Each curve's ratio of every run step to the one before, by the chosen interpolation."""
    steps = len(sigmas) - 1
    if interpolation == "nearest":
        return [nearest_ratios(curve.ratios, steps) for curve in plan.curves]
    measured = plan.conditions.sigmas or knots or resampled_sigmas(sigmas, plan.conditions.steps)
    measured = measured[: plan.conditions.steps]
    return [cumulative_ratios(curve.ratios, measured, sigmas[:-1]) for curve in plan.curves]


def _magcache(
    plan: MagCachePlan,
    sigmas: tuple[float, ...],
    rule: MagCacheRule,
    allowed: list[bool],
    knots: Sequence[float] | None,
    warnings: list[str],
) -> Schedule:
    ratios = run_ratios(plan, sigmas, rule.interpolation, knots)
    skipped, errors = accumulated_errors(ratios, rule, allowed)
    return Schedule(
        sigmas=sigmas,
        skipped=tuple(skipped),
        accumulated=tuple(errors),
        error=max(errors),
        predicted_rms=_predicted_rms(plan, sigmas, skipped),
        planned=False,
        extrapolate=False,
        warnings=tuple(warnings),
    )


def _of_latents(plan: MagCachePlan) -> bool:
    """True when the calibration's errors are errors of the latent, not of hidden states."""
    return plan.calibrated and plan.conditions.measure == "latent"


def _predicted_rms(
    plan: MagCachePlan, sigmas: Sequence[float], skipped: Sequence[int]
) -> float | None:
    steps = len(sigmas) - 1
    if not _of_latents(plan) or steps > MAX_PLANNED_STEPS:
        return None
    inner, weights = _inner_products(plan, sigmas), _weights(sigmas)
    return reuse_error(inner, weights, predicted_from(steps, skipped))


def _inner_products(plan: MagCachePlan, sigmas: Sequence[float]) -> Array:
    """Of the run's steps, (N, N), from those that were measured."""
    interpolate = interpolation_weights(plan.conditions.sigmas[:-1], sigmas[:-1])
    return interpolate @ full_matrix(plan.inner_products) @ interpolate.T


def _weights(sigmas: Sequence[float]) -> Array:
    """What each step's error costs the final latent to first order: an error e of the velocity
    over one step moves it by e |d sigma|. (N,)"""
    return np.abs(np.diff(sigmas))


def _planned(
    plan: MagCachePlan,
    sigmas: tuple[float, ...],
    rule: PlannedRule,
    allowed: list[bool],
    warnings: list[str],
) -> Schedule:
    steps = len(sigmas) - 1
    warmup = min(rule.warmup, steps)
    may_skip = np.array(allowed)
    may_skip[:warmup] = False
    may_skip[-1] = False
    extrapolate, reach = rule.predict == "extrapolate", min(rule.k, steps)
    inner, weights = _inner_products(plan, sigmas), _weights(sigmas)
    errors = prediction_errors(inner, np.asarray(sigmas[:-1]), reach, extrapolate)
    least, came_from = least_error_paths(jump_costs(errors, weights, may_skip), warmup)
    gap, evaluations = _choose(least, steps, rule)
    reached = steps / evaluations
    if rule.max_error == 0 and reached < rule.speedup * 0.999:
        warnings.append(_beyond_reach(rule, steps, reached))
    computed = computed_steps(came_from, gap, evaluations)
    return Schedule(
        sigmas=sigmas,
        skipped=tuple(sorted(set(range(steps)) - set(computed))),
        accumulated=gathered_errors(errors, weights, computed),
        error=float(least[gap, evaluations]),
        predicted_rms=float(least[gap, evaluations]) if _of_latents(plan) else None,
        planned=True,
        extrapolate=extrapolate,
        warnings=tuple(warnings),
    )


def _beyond_reach(rule: PlannedRule, steps: int, reached: float) -> Text:
    return Text(
        "speedup {speedup} cannot be reached in {steps} steps with warmup_steps {warmup}, k {k} "
        "and this range: {reached} instead",
        speedup=f"{rule.speedup:g}",
        steps=steps,
        warmup=rule.warmup,
        k=rule.k,
        reached=f"{reached:.2f}",
    )


def _choose(at_end: Array, steps: int, rule: PlannedRule) -> tuple[int, int]:
    """(gap, evaluations) of the state to end in: within the budget, or below the error."""
    least = at_end.min(axis=0)
    feasible = np.flatnonzero(np.isfinite(least))
    if rule.max_error > 0:
        good = [n for n in feasible if least[n] <= rule.max_error]
        evaluations = int(good[0])  # all steps computed has error 0
    else:
        budget = math.floor(steps / rule.speedup)
        within = feasible[feasible <= budget]
        choices = within if len(within) else feasible[:1]
        evaluations = int(choices[np.argmin(least[choices])])
    return int(at_end[:, evaluations].argmin()), evaluations
