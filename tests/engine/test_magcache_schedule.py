"""The planned schedule: optimal, within its bounds, the same from another number of steps."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from comfyui_braid.engine.magcache.calibration import (
    ResidualRecorder,
    average_of_alike,
    calibrated_plan,
    consecutive_change,
)
from comfyui_braid.engine.magcache.curve import (
    cumulative_ratios,
    interpolated,
    nearest_ratios,
    resampled_sigmas,
)
from comfyui_braid.engine.magcache.figure import draw_calibration, draw_schedule
from comfyui_braid.engine.magcache.plan import Conditions, MagCachePlan, plan_from_ratios
from comfyui_braid.engine.magcache.rules import MagCacheRule, PlannedRule
from comfyui_braid.engine.magcache.schedule import plan_schedule, run_ratios

EXAMPLE = json.loads(
    (Path(__file__).parents[1] / "goldens" / "magcache_decisions.json").read_text()
)["calibration_formula_example"]
ELEMENTS = 64


def shifted(steps: int, shift: float = 3.0) -> list[float]:
    t = np.linspace(1, 0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).tolist()


def residual_at(sigma: float) -> torch.Tensor:
    """A smooth curved path of residuals (1, 64, 4, 4) over the noise level."""
    phases = torch.linspace(0, 6, ELEMENTS * 16)
    grow = 1 + 0.3 * sigma + 0.2 * math.exp(-12 * sigma)
    return (grow * torch.sin(phases + 2.0 * sigma + 1.5 * sigma**3)).reshape(1, ELEMENTS, 4, 4)


def calibrate(sigmas, residual=residual_at) -> MagCachePlan:
    recorder = ResidualRecorder("positive", channel_dim=1)
    for sigma in sigmas[:-1]:
        recorder.add(residual(sigma))
    conditions = Conditions(steps=len(sigmas) - 1, sigmas=tuple(sigmas), measure="latent")
    return calibrated_plan("test", conditions, [recorder], [recorder], "test")


def true_error(sigmas, computed, extrapolate) -> float:
    """Sum of |d sigma| RMS(r_i - prediction), straight from the residuals."""
    total = 0.0
    for i in range(len(sigmas) - 1):
        if i in computed:
            continue
        done = [step for step in computed if step < i]
        b = done[-1]
        predicted = residual_at(sigmas[b])
        if extrapolate and len(done) > 1:
            a = done[-2]
            w = (sigmas[i] - sigmas[b]) / (sigmas[b] - sigmas[a])
            predicted = predicted + w * (predicted - residual_at(sigmas[a]))
        rms = (residual_at(sigmas[i]) - predicted).pow(2).mean().sqrt()
        total += float(rms) * abs(sigmas[i + 1] - sigmas[i])
    return total


@pytest.mark.parametrize("predict", ["extrapolate", "reuse"])
@pytest.mark.parametrize("k", [2, 4])
def test_the_planned_schedule_has_the_least_error_of_all_schedules(predict, k):
    steps, budget = 12, 6
    sigmas = shifted(steps)
    rule = PlannedRule(speedup=steps / budget, warmup_steps=2, k=k, predict=predict)
    schedule = plan_schedule(calibrate(sigmas), sigmas, rule)

    def allowed(middle):
        computed = (0, 1, *middle, steps - 1)
        return all(b - a <= k + 1 for a, b in itertools.pairwise(computed))

    best = min(
        true_error(sigmas, (0, 1, *middle, steps - 1), predict == "extrapolate")
        for count in range(budget - 2)
        for middle in itertools.combinations(range(2, steps - 1), count)
        if allowed(middle)
    )
    computed = [step for step in range(steps) if step not in schedule.skipped]
    assert true_error(sigmas, computed, predict == "extrapolate") == pytest.approx(best, rel=1e-4)
    assert schedule.error == pytest.approx(best, rel=1e-3)


def test_residuals_on_a_line_are_extrapolated_without_error():
    def line(sigma):
        return torch.ones(1, 4, 2, 2) + sigma * torch.arange(16.0).reshape(1, 4, 2, 2)

    sigmas = shifted(20)
    plan = calibrate(sigmas, line)
    rule = PlannedRule(speedup=3)
    assert plan_schedule(plan, sigmas, rule).error < 1e-5
    assert plan_schedule(plan, sigmas, PlannedRule(speedup=3, predict="reuse")).error > 0.01


@pytest.mark.parametrize("steps", [12, 20, 28, 35])
def test_a_calibration_at_50_steps_plans_as_one_made_at_those_steps(steps):
    native = calibrate(shifted(steps))
    from_50 = calibrate(shifted(50))
    rule = PlannedRule(speedup=2.0, k=4)
    expected = plan_schedule(native, shifted(steps), rule).skipped
    assert plan_schedule(from_50, shifted(steps), rule).skipped == expected


@pytest.mark.parametrize("steps", [12, 20, 28])
def test_the_paper_rule_from_50_steps_skips_as_calibrated_at_those_steps(steps):
    rule = MagCacheRule(threshold=0.06, k=2)
    expected = plan_schedule(calibrate(shifted(steps)), shifted(steps), rule).skipped
    assert plan_schedule(calibrate(shifted(50)), shifted(steps), rule).skipped == expected


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize(("steps", "factor"), [(12, 0.2), (20, 0.2), (35, 0.5), (80, 0.5)])
def test_cumulative_ratios_are_far_nearer_the_truth_than_nearest_ones(shift, steps, factor):
    plan = calibrate(shifted(50))
    sigmas = shifted(steps, shift)
    norms = [float(residual_at(sigma).norm()) for sigma in sigmas[:-1]]
    true = [b / a for a, b in itertools.pairwise(norms)]

    def error(ratios):
        late = slice(steps // 5, None)
        pairs = zip(ratios[1:][late], true[late], strict=True)
        return sum(abs(math.log(r / t)) for r, t in pairs)

    (cumulative,) = run_ratios(plan, sigmas, "cumulative")
    nearest = nearest_ratios(plan.curves[0].ratios, steps)
    assert error(cumulative) <= factor * error(nearest)


def test_at_the_calibrated_levels_cumulative_ratios_are_the_measured_ones():
    plan = calibrate(shifted(50))
    assert run_ratios(plan, shifted(50), "cumulative")[0] == pytest.approx(plan.curves[0].ratios)


def test_a_list_without_noise_levels_is_laid_over_the_runs_own_schedule():
    plan = plan_from_ratios("1,1.1,1.1,1.1,1.1,1.1,1.1,1.1")
    (ratios,) = run_ratios(plan, shifted(4, 1.0), "cumulative")
    assert ratios == pytest.approx([1.0, 1.21, 1.21, 1.21])


def test_half_a_run_reads_the_half_of_the_list_that_belongs_to_its_levels():
    ratios = [1.0, 1.5, 1.0, 1.0, 1.0, 1.0, 0.9, 0.8]
    knots = [1 - i / 8 for i in range(8)]
    late = cumulative_ratios(ratios, knots, knots[4:])
    assert late == pytest.approx([1.0, 1.0, 0.9, 0.8])


def test_interpolation_is_exact_on_knots_and_goes_on_outside():
    assert interpolated([1.0, 0.5, 0.0], [0.0, 1.0, 4.0], 0.5) == 1.0
    assert interpolated([1.0, 0.5, 0.0], [0.0, 1.0, 4.0], 0.25) == 2.5
    assert interpolated([1.0, 0.5], [0.0, 1.0], 0.0) == 2.0


def test_resampling_a_schedule_keeps_its_ends():
    assert resampled_sigmas((1.0, 0.5, 0.0), 4) == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))


@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0])
def test_the_wanted_speedup_is_reached_and_never_overrun_by_a_whole_step(speedup):
    sigmas = shifted(50)
    schedule = plan_schedule(calibrate(sigmas), sigmas, PlannedRule(speedup=speedup))
    assert schedule.computed <= 50 / speedup
    assert schedule.skipped and 0 not in schedule.skipped and 49 not in schedule.skipped


def test_an_unreachable_speedup_says_what_is_reached_instead():
    sigmas = shifted(20)
    schedule = plan_schedule(calibrate(sigmas), sigmas, PlannedRule(speedup=10, k=1))
    assert any("speedup 10 cannot be reached" in warning for warning in schedule.warnings)


def test_max_error_takes_the_fewest_evaluations_below_it():
    sigmas = shifted(30)
    plan = calibrate(sigmas)
    by_error = plan_schedule(plan, sigmas, PlannedRule(max_error=0.01))
    assert by_error.error <= 0.01
    fewer = plan_schedule(plan, sigmas, PlannedRule(speedup=30 / (by_error.computed - 1)))
    assert fewer.error > 0.01


def test_more_steps_skipped_cost_more_predicted_error():
    sigmas = shifted(40)
    plan = calibrate(sigmas)
    errors = [
        plan_schedule(plan, sigmas, PlannedRule(speedup=s)).error for s in (1.2, 1.5, 2, 3, 4)
    ]
    assert errors == sorted(errors)


def test_warm_up_and_range_are_respected():
    sigmas = shifted(30)
    allowed = [10 <= step < 20 for step in range(30)]
    rule = PlannedRule(speedup=1.3, warmup_steps=12)
    schedule = plan_schedule(calibrate(sigmas), sigmas, rule, allowed)
    assert schedule.skipped and set(schedule.skipped) <= set(range(12, 20))


def test_planned_without_a_calibration_says_what_to_do():
    with pytest.raises(ValueError, match="needs a calibration.*MagCache Calibrate"):
        plan_schedule(plan_from_ratios("1,1,1"), shifted(20), PlannedRule())


@pytest.mark.parametrize("rule", [PlannedRule(speedup=1), PlannedRule(k=0)])
def test_speedup_one_or_k_zero_skips_nothing(rule):
    assert plan_schedule(calibrate(shifted(20)), shifted(20), rule).skipped == ()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tiny_runs_are_computed(steps):
    plan = calibrate(shifted(20))
    assert plan_schedule(plan, shifted(steps), PlannedRule(speedup=3)).skipped == ()


@pytest.mark.parametrize("rule", [MagCacheRule(retention_ratio=0.0), PlannedRule()])
def test_levels_that_do_not_fall_skip_nothing_and_say_so(rule):
    sigmas = [*shifted(20)[:10], *shifted(20)[5:]]
    schedule = plan_schedule(calibrate(shifted(20)), sigmas, rule)
    assert schedule.skipped == () and "do not fall" in schedule.warnings[-1]


def test_few_steps_warn_that_caching_does_not_pay():
    schedule = plan_schedule(plan_from_ratios("1,1,1,1,1,1,1,1"), shifted(8), MagCacheRule())
    assert any("8 steps are few" in warning for warning in schedule.warnings)


def test_the_change_from_step_to_step_is_musubis_formula():
    previous = torch.tensor(EXAMPLE["prev_residual"], dtype=torch.float32)[None]
    current = torch.tensor(EXAMPLE["cur_residual"], dtype=torch.float32)[None]
    ratio, spread, cosine = consecutive_change(previous, current, channel_dim=-1).tolist()
    assert ratio == pytest.approx(EXAMPLE["norm_ratio"])
    assert spread == pytest.approx(EXAMPLE["norm_std"])
    assert cosine == pytest.approx(EXAMPLE["cos_dis"])


def test_tokens_without_a_previous_residual_do_not_make_the_ratio_infinite():
    previous = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    current = torch.tensor([[[1.0, 1.0], [6.0, 8.0]]])
    assert consecutive_change(previous, current, -1)[0].item() == pytest.approx(2.0)


def test_runs_under_the_same_conditions_are_averaged_and_others_left_out():
    sigmas = shifted(10)
    one, other = calibrate(sigmas), calibrate(shifted(11))
    two = calibrate(sigmas, lambda s: 2 * residual_at(s * s))
    mean = average_of_alike([other, one, two])
    pair = zip(one.curves[0].ratios, two.curves[0].ratios, strict=True)
    assert mean.curves[0].ratios == pytest.approx([(a + b) / 2 for a, b in pair])
    assert mean.source == "test, mean of 2 runs" and mean.conditions == two.conditions
    assert average_of_alike([one, two, other]) == other


def test_pictures_have_the_size_of_a_node_and_something_on_them():
    plan = calibrate(shifted(20))
    schedule = plan_schedule(plan, shifted(20), PlannedRule())
    for picture in (draw_calibration(plan), draw_schedule(schedule, plan.name)):
        assert picture.dtype == np.uint8 and picture.shape[1] == 888
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
