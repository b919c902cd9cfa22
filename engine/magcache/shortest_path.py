"""The schedule with the least predicted error, as a shortest path over pairs of computed steps.

A skipped step i is predicted from the last two computed steps a < b by the line through them,

    r_hat = (1 + w) r_b - w r_a,    w = (sigma_i - sigma_b) / (sigma_b - sigma_a),

so its error ||r_i - r_hat|| is a quadratic form in the inner products of r_a, r_b, r_i, and
depends on both. The state of the path is therefore the pair. w = 0 is plain reuse.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Gaps = NDArray[np.int8]


def interpolation_weights(knots: Sequence[float], sigmas: Sequence[float]) -> Array:
    """(run steps, measured steps) weights that give r(sigma) from the r measured at `knots`.

    Cubic through the four nearest knots, so that the curvature between knots is kept; linear with
    fewer than four. At most one knot distance outside the measured range.
    """
    at_knot, at = np.asarray(knots), np.asarray(sigmas)
    points = min(4, len(at_knot))
    if points < 4:
        points = min(2, len(at_knot))
    high = at_knot[0] + (at_knot[0] - at_knot[min(1, len(at_knot) - 1)])
    low = at_knot[-1] - (at_knot[max(len(at_knot) - 2, 0)] - at_knot[-1])
    at = np.clip(at, low, high)
    right = np.searchsorted(-at_knot, -at)
    first = np.clip(right - points // 2, 0, len(at_knot) - points)
    weights = np.zeros((len(at), len(at_knot)))
    rows = np.arange(len(at))
    for i in range(points):
        lagrange = np.ones(len(at))
        for j in range(points):
            if j != i:
                lagrange *= (at - at_knot[first + j]) / (at_knot[first + i] - at_knot[first + j])
        weights[rows, first + i] = lagrange
    return weights


def full_matrix(lower_triangle: Sequence[Sequence[float]]) -> Array:
    """The symmetric matrix of a lower triangle given row by row."""
    size = len(lower_triangle)
    matrix = np.zeros((size, size))
    for index, row in enumerate(lower_triangle):
        matrix[index, : index + 1] = row
        matrix[: index + 1, index] = row
    return matrix


def prediction_errors(inner: Array, sigmas: Array, reach: int, extrapolate: bool) -> Array:
    """RMS error of predicting step b + s from computed steps b - g and b.

    `inner` (N, N) are the inner products of the steps' residuals. Returns (N, reach + 1, reach):
    axes b, g - 1, s - 1; entries past the end of the run, or with b - g < 0, mean reuse of step b.
    """
    steps = len(sigmas)
    b = np.arange(steps)[:, None, None]
    a = b - np.arange(1, reach + 2)[None, :, None]
    i = np.minimum(b + np.arange(1, reach + 1)[None, None, :], steps - 1)
    has_pair = a >= 0
    a = np.maximum(a, 0)
    spacing = np.where(has_pair, sigmas[b] - sigmas[a], 1.0)
    w = np.where(has_pair & extrapolate, (sigmas[i] - sigmas[b]) / spacing, 0.0)
    squared = (
        inner[i, i]
        + (1 + w) ** 2 * inner[b, b]
        + w**2 * inner[a, a]
        - 2 * (1 + w) * inner[i, b]
        + 2 * w * inner[i, a]
        - 2 * (1 + w) * w * inner[a, b]
    )
    return np.sqrt(np.maximum(squared, 0.0))


def jump_costs(errors: Array, weights: Array, may_skip: NDArray[np.bool_]) -> Array:
    """Cost of going from computed step b straight to b + h: the skipped steps' weighted errors.

    Returns (N, reach + 1, reach + 1): axes b, g - 1, h - 1; infinite where a step may not be
    skipped.
    """
    steps, gaps, reach = errors.shape
    i = np.arange(steps)[:, None] + np.arange(1, reach + 1)[None, :]
    inside = np.minimum(i, steps - 1)
    allowed = ((i < steps) & may_skip[inside])[:, None, :]
    costs = np.zeros((steps, gaps, reach + 1))
    step_costs = np.where(allowed, errors * weights[inside][:, None, :], np.inf)
    costs[:, :, 1:] = np.cumsum(step_costs, axis=2)
    return costs


def path_operations(steps: int, reach: int) -> int:
    """How many additions `least_error_paths` makes, about: what its time goes with."""
    return steps**2 * (reach + 1) ** 2 // 2


def least_error_paths(costs: Array, warmup: int) -> tuple[Array, Gaps]:
    """Dynamic programme over (last computed step, gap to the one before, evaluations so far).

    The first `warmup` steps are computed. Returns the least cost to end at each (gap, evaluations)
    of the last step, (reach + 1, N + 1), and the gap that each state was reached from, (N,
    reach + 1, N + 1). Of the costs on the way only the steps that are in reach are kept.
    """
    steps, gaps, jumps = costs.shape
    least: defaultdict[int, Array] = defaultdict(lambda: np.full((gaps, steps + 1), np.inf))
    came_from = np.zeros((steps, gaps, steps + 1), dtype=np.int8)  # reach is at most 32
    least[warmup - 1][0, warmup] = 0.0
    for b in range(warmup - 1, steps - 1):
        so_far = least.pop(b)[:, None, : b + 2]  # at most b + 1 evaluations
        through = so_far + costs[b][:, :, None]  # (gap, jump, evaluations)
        gap = through.argmin(axis=0)
        best = np.take_along_axis(through, gap[None], axis=0)[0]
        for jump in range(min(jumps, steps - 1 - b)):
            least[b + jump + 1][jump, 1 : b + 3] = best[jump]
            came_from[b + jump + 1, jump, 1 : b + 3] = gap[jump]
    return least[steps - 1], came_from


def computed_steps(came_from: Gaps, gap: int, evaluations: int) -> list[int]:
    """Walk back from the last step (reached over `gap`) to the first; warm-up steps come along."""
    step, steps = len(came_from) - 1, []
    while step > 0 and evaluations > 0:
        steps.append(step)
        previous = int(came_from[step, gap, evaluations])
        step, gap, evaluations = step - gap - 1, previous, evaluations - 1
    return [*range(step + 1), *reversed(steps)]


def gathered_errors(errors: Array, weights: Array, computed: Sequence[int]) -> tuple[float, ...]:
    """At every step of a given schedule, the weighted errors since the last computed step."""
    steps, gaps, _ = errors.shape
    gathered = [0.0] * steps
    ends = [*computed[1:], steps]
    for index, (b, end) in enumerate(zip(computed, ends, strict=True)):
        gap = min(b - computed[index - 1], gaps) if index else gaps
        for i in range(b + 1, end):
            gathered[i] = gathered[i - 1] + float(errors[b, gap - 1, i - b - 1] * weights[i])
    return tuple(gathered)


def reuse_error(inner: Array, weights: Array, predicted_from: Mapping[int, int]) -> float:
    """Sum of the weighted RMS errors of skipped steps, each predicted as the computed step before
    it (`prediction_errors` without the line)."""
    if not predicted_from:
        return 0.0
    i, b = np.array(list(predicted_from)), np.array(list(predicted_from.values()))
    squared = inner[i, i] + inner[b, b] - 2 * inner[i, b]
    return math.fsum(np.sqrt(np.maximum(squared, 0.0)) * weights[i])
