"""Noise levels of a run: whole, in parts, in any order, and those of published lists."""

import pytest
import torch
from magcache_runs import (
    GREEDY,
    cached,
    calibrate,
    flux_plan,
    sample,
    sample_levels,
    small_flux,
    warnings_of,
)
from tiny_models import build, latent

from comfyui_braid.engine.comfyui.magcache.conditions import schedule_knots
from comfyui_braid.engine.magcache.presets import preset_named, presets
from comfyui_braid.engine.magcache.rules import MagCacheRule, MagCacheSettings, PlannedRule
from comfyui_braid.engine.magcache.schedule import plan_schedule
from comfyui_braid.nodes.magcache.live import planned_strip


@pytest.fixture(scope="module")
def model():
    return small_flux()


LEVELS = {
    "no step": [1.0],
    "one step": [1.0, 0.0],
    "noise added back": [1.0, 0.8, 0.6, 0.4, 0.7, 0.5, 0.3, 0.1, 0.0],
    "the same level twice": [1.0, 0.9, 0.9, 0.7, 0.7, 0.4, 0.2, 0.0],
    "from picture to noise": [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0],
}


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_levels_that_do_not_fall_are_computed_in_full_and_the_run_says_so(levels, sampler, model):
    plain = sample_levels(model, levels, sampler)
    for rule in (GREEDY, PlannedRule(speedup=2.0)):
        patched, patch = cached(model, flux_plan(), rule)
        samples = sample_levels(patched, levels, sampler)
        assert torch.equal(samples.nan_to_num(7.0), plain.nan_to_num(7.0)), rule
        if len(levels) > 2:
            assert "do not fall" in warnings_of(patch), rule


def test_img2img_plans_on_its_own_noise_levels(model):
    patched, patch = cached(model, flux_plan(20), PlannedRule(speedup=2.0))
    sample(patched, "flux", steps=8, start=latent("flux", seed=5), denoise=0.5)
    schedule = patch.last_report.schedule
    assert schedule.sigmas[0] < 0.6 and schedule.computed == 4
    assert 0 not in schedule.skipped and 7 not in schedule.skipped


def test_chained_samplers_each_compute_their_first_and_last_step(model):
    patched, patch = cached(model)
    first = sample(patched, "flux", last_step=5, force_full_denoise=False)
    assert patch.last_report.schedule.skipped == (1, 2)
    sample(patched, "flux", start_step=5, disable_noise=True, start=first)
    assert patch.last_report.schedule.skipped == (1,)


def test_two_experts_of_one_run_plan_on_their_own_ranges():
    high, low = build("wan", seed=0), build("wan", seed=1)
    plan_high, half = calibrate(high, "wan", steps=12, last_step=6)
    plan_low, _ = calibrate(low, "wan", steps=12, start_step=6, disable_noise=True, start=half)
    assert plan_high.conditions.sigmas[-1] == plan_low.conditions.sigmas[0]
    rule = PlannedRule(speedup=1.5)
    cached_high, patch_high = cached(high, plan_high, rule)
    cached_low, patch_low = cached(low, plan_low, rule)
    half = sample(cached_high, "wan", steps=12, last_step=6)
    out = sample(cached_low, "wan", steps=12, start_step=6, disable_noise=True, start=half)
    for patch in (patch_high, patch_low):
        assert patch.last_report.schedule.computed == 4
        assert not patch.last_report.schedule.warnings[:-1], "only the warning of few steps"
    assert torch.isfinite(out).all()


def test_start_and_end_percent_bound_the_skipping(model):
    patched, patch = cached(model, start_percent=0.3, end_percent=0.7)
    sample(patched, "flux")
    sigmas = patch.last_report.schedule.sigmas
    assert patch.last_report.schedule.skipped
    assert all(0.3 < sigmas[step] <= 0.7 for step in patch.last_report.schedule.skipped)


@pytest.mark.parametrize("interpolation", ["cumulative", "nearest"])
@pytest.mark.parametrize("name", presets())
def test_a_published_list_is_planned_as_it_runs_at_its_own_number_of_steps(
    name, interpolation, model
):
    """With `nearest`, at any number of steps."""
    plan = preset_named(name)
    own = plan.conditions.steps
    rule = MagCacheRule(interpolation=interpolation)
    for steps in (own,) if interpolation == "cumulative" else (own, 20, 35):
        strip = planned_strip(MagCacheSettings(plan=plan, rule=rule), steps)["skipped"]
        levels = schedule_knots(model, steps)
        run = plan_schedule(plan, [*levels, 0.0], rule, knots=schedule_knots(model, own))
        assert list(run.skipped) == strip
