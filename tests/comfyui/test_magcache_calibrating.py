"""Calibration runs: whole or refused, averaged, and told where the run is another."""

import pytest
import torch
from comfy.model_management import InterruptProcessingException
from magcache_runs import (
    GREEDY,
    STEPS,
    cached,
    calibrate,
    flux_plan,
    sample,
    sample_levels,
    small_flux,
    warnings_of,
)
from tiny_models import latent

from comfyui_braid.engine.comfyui.magcache.calibrate import Calibrator
from comfyui_braid.engine.magcache.rules import PlannedRule


@pytest.fixture(scope="module")
def model():
    return small_flux()


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun", "dpmpp_sde", "dpmpp_2m"])
def test_calibrations_of_every_kind_of_sampler_are_whole(sampler, model):
    plan, _ = calibrate(model, "flux", sampler=sampler)
    assert plan.calibrated and len(plan.inner_products) == STEPS


def test_a_sampler_off_the_schedule_cannot_calibrate_and_says_so(model):
    with pytest.raises(ValueError, match="did not call the model at all .* calibrate with euler"):
        calibrate(model, "flux", sampler="dpm_adaptive", cfg=1.0)


def test_levels_that_do_not_fall_cannot_be_calibrated_on(model):
    calibrating = Calibrator().attach(model)
    with pytest.raises(ValueError, match="the noise levels do not fall"):
        sample_levels(calibrating, [1.0, 0.8, 0.6, 0.4, 0.7, 0.5, 0.3, 0.1, 0.0], "euler")
    no_step = sample_levels(calibrating, [1.0], "euler")
    assert torch.equal(no_step, sample_levels(model, [1.0], "euler"))


def test_an_interrupted_calibration_keeps_the_measurement_before_it(model):
    calibrator = Calibrator()
    patched = calibrator.attach(model)
    sample(patched, "flux")
    before = calibrator.result()

    def stop(step, *_):
        raise InterruptProcessingException()

    with pytest.raises(InterruptProcessingException):
        sample(patched, "flux", callback=stop)
    assert calibrator.result() == before


def test_several_runs_are_averaged(model):
    calibrator = Calibrator()
    patched = calibrator.attach(model)
    sample(patched, "flux")
    sample(patched, "flux", noise=latent("flux", seed=3))
    first, second = (plan.curves[0].ratios for plan in calibrator.plans)
    mean = calibrator.result().curves[0].ratios
    assert mean == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    assert first != second
    sample(patched, "flux", steps=5)
    assert calibrator.result().conditions.steps == 5, "other conditions are not averaged"


def test_an_empty_calibrator_says_what_to_connect():
    with pytest.raises(ValueError, match="connect the latent of the sampler that used the calib"):
        Calibrator().result()


def test_a_run_unlike_its_calibration_warns_and_names_the_field(model):
    patched, patch = cached(model, flux_plan(12), PlannedRule(speedup=2.0))
    sample(patched, "flux", steps=12, cfg=3.0, sampler="dpmpp_2m")
    fields = [warning.split(":")[0] for warning in patch.last_report.schedule.warnings]
    assert fields == ["sampler", "cfg"]


def test_a_calibration_under_noise_is_told_to_the_planned_rule(model):
    plan = flux_plan(12, "euler_ancestral")
    told = "calibrated with euler_ancestral, which adds noise: calibrate with euler instead"
    for rule, expected in ((PlannedRule(speedup=2.0), True), (GREEDY, False)):
        patched, patch = cached(model, plan, rule)
        sample(patched, "flux", steps=12)
        assert (told in warnings_of(patch)) == expected
