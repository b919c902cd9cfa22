"""Samplers under MagCache: what is said of each, what each skips, and noise that is added."""

import itertools

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from magcache_runs import (
    GREEDY,
    SKIPPED,
    cached,
    counting,
    flux_plan,
    labels,
    sample,
    sample_levels,
    small_flux,
    warnings_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_braid.engine.comfyui.magcache.samplers import (
    OWN_LEVELS,
    adds_noise,
    calls_follow_schedule,
    noisy_by_name,
    sampler_name,
)
from comfyui_braid.engine.magcache.clock import same_level
from comfyui_braid.engine.magcache.rules import PlannedRule


@pytest.fixture(scope="module")
def model():
    return small_flux()


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_what_is_said_of_a_core_sampler_is_what_it_does(sampler, model):
    levels, facts = [], {}

    def outer(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        facts.update(
            name=sampler_name(sampler),
            follows=calls_follow_schedule(sampler),
            noisy=adds_noise(sampler),
            sigmas=sigmas.tolist()[:-1],
        )
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def predict(executor, x, timestep, *args):
        levels.append(float(timestep[0]))
        return executor(x, timestep, *args)

    tapped = model.clone()
    tapped.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", outer)
    tapped.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", predict)
    sample(tapped, "flux", steps=4, cfg=1.0, sampler=sampler)
    if facts["follows"]:  # SDE samplers start a little below the first level
        assert levels == pytest.approx(facts["sigmas"], abs=3e-4)
    on_schedule = all(
        any(same_level(sigma, level) for level in levels) for sigma in facts["sigmas"]
    )
    assert on_schedule == (sampler not in OWN_LEVELS)
    noisy = ("ancestral", "sde", "ddpm", "lcm", "seeds", "sa_solver")
    assert facts["noisy"] == any(word in sampler for word in noisy)
    assert noisy_by_name(facts["name"]) == facts["noisy"]


SAMPLERS_RUN = (
    "heun dpm_2 dpmpp_2m dpmpp_sde dpmpp_2m_sde euler_ancestral lcm uni_pc seeds_2".split()
)


@pytest.mark.parametrize("sampler", SAMPLERS_RUN)
def test_every_kind_of_sampler_skips_whole_steps(sampler, model):
    counts = []
    patched, patch = cached(counting(model, counts))
    samples = sample(patched, "flux", cfg=1.0, sampler=sampler)
    ((computed, skipped),) = labels(patch).values()
    assert torch.isfinite(samples).all()
    assert set(skipped) == set(SKIPPED) and not set(skipped) & set(computed)
    assert len(counts) == len(computed)


SEVERAL_CALLS = (
    "heun heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde dpm_2 dpm_2_ancestral dpmpp_2s_ancestral "
    "dpmpp_2s_ancestral_cfg_pp dpmpp_sde seeds_2 seeds_3 sa_solver_pece uni_pc"
).split()


@pytest.mark.parametrize("sampler", SEVERAL_CALLS)
def test_extrapolation_stays_near_the_picture_with_samplers_that_call_several_times(sampler, model):
    """Two calls at one noise level, a rounding apart, make no line to follow."""
    plain = sample(model, "flux", steps=12, cfg=1.0, sampler=sampler)
    patched, patch = cached(model, flux_plan(12), PlannedRule(speedup=1.5))
    samples = sample(patched, "flux", steps=12, cfg=1.0, sampler=sampler)
    assert len(patch.last_report.skipped_steps) == 4
    assert float((samples - plain).norm()) < 0.25 * float(plain.norm())


@pytest.mark.parametrize("sampler", ["dpm_fast", "dpm_adaptive"])
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_a_sampler_with_noise_levels_of_its_own_is_computed_in_full_and_the_run_says_so(
    sampler, model
):
    patched, patch = cached(model)
    assert torch.equal(
        sample(patched, "flux", cfg=1.0, sampler=sampler),
        sample(model, "flux", cfg=1.0, sampler=sampler),
    )
    expected = f"{sampler} chooses its own noise levels: every step is computed"
    assert expected in patch.last_report.schedule.warnings


def test_a_residual_older_than_the_schedule_counts_on_is_not_used(model):
    """A sampler of another pack that calls between the levels, after its first step."""

    def between(model, x, sigmas, extra_args=None, callback=None, disable=None):
        levels = [sigmas[0], *(0.97 * sigmas[1:-1]), sigmas[-1]]
        for now, after in itertools.pairwise(levels):
            denoised = model(x, now * x.new_ones([x.shape[0]]), **extra_args)
            x = x + (x - denoised) / now * (after - now)
        return x

    patched, patch = cached(model)
    sample_levels(patched, [1 - i / 8 for i in range(9)], comfy.samplers.KSAMPLER(between))
    computed, skipped = labels(patch)["positive"]
    assert skipped == (1, 2) and computed == (0, 3, 4, 5, 6, 7)


class CountReads(TorchDispatchMode):
    """Counts the places where Python waits for a tensor's value."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "res_multistep"])
def test_steps_are_skipped_without_waiting_for_the_device(sampler, model):
    def reads(patched, steps):
        counter = CountReads()
        with counter:
            sample(patched, "flux", steps=steps, sampler=sampler)
        return counter.reads

    patched, _ = cached(model, rule=GREEDY)
    plain = reads(model, 8) - reads(model, 5)
    assert reads(patched, 8) - reads(patched, 5) <= plain


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde"])
def test_planned_runs_of_samplers_that_add_noise_reuse_and_say_so(sampler, model):
    patched, patch = cached(model, flux_plan(12), PlannedRule(speedup=2.0))
    extrapolating = sample(patched, "flux", steps=12, sampler=sampler)
    assert not patch.last_report.schedule.extrapolate
    assert f"{sampler} adds noise, which would be extrapolated" in warnings_of(patch)
    patched, patch = cached(model, flux_plan(12), PlannedRule(speedup=2.0, predict="reuse"))
    assert torch.equal(sample(patched, "flux", steps=12, sampler=sampler), extrapolating)
    assert "adds noise" not in warnings_of(patch)


def test_without_noise_the_planned_rule_extrapolates_as_told(model):
    patched, patch = cached(model, flux_plan(12), PlannedRule(speedup=2.0))
    sample(patched, "flux", steps=12, sampler="dpmpp_2m")
    assert patch.last_report.schedule.extrapolate and "adds noise" not in warnings_of(patch)
