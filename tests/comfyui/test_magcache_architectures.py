"""MagCache on real tiny models of every architecture."""

import functools

import pytest
import torch
from magcache_runs import STEPS, cached, calibrate, close, counting, ones, sample
from tiny_models import MODELS, build

from comfyui_braid.engine.comfyui.magcache.blocks import block_keys
from comfyui_braid.engine.comfyui.playground import load_playground_model
from comfyui_braid.engine.magcache.rules import MagCacheRule, PlannedRule

HOOKED = ("flux", "flux_dev", "wan", "qwen_image", "hunyuan_video")
EVERY = (*MODELS, "playground")


@functools.cache
def world(name):
    """(model, name of the latents and conditioning that fit it)."""
    return (load_playground_model(), "flux") if name == "playground" else (build(name), name)


@functools.cache
def measured(name):
    """(samples without MagCache, the calibration of the model, samples of the calibration)."""
    model, kind = world(name)
    return (sample(model, kind), *calibrate(model, kind))


@pytest.mark.parametrize("name", EVERY)
def test_calibrating_and_a_cache_that_is_off_leave_every_bit_as_it_was(name):
    model, kind = world(name)
    plain, plan, calibrating = measured(name)
    assert torch.equal(calibrating, plain)
    for rule in (MagCacheRule(threshold=0.0), MagCacheRule(k=0), PlannedRule(speedup=1.0)):
        patched, _ = cached(model, plan, rule)
        assert torch.equal(sample(patched, kind), plain)
    assert torch.equal(sample(model, kind), plain)


@pytest.mark.parametrize("name", EVERY)
def test_skipped_steps_call_no_network_and_the_report_counts_them(name):
    model, kind = world(name)
    plain, plan, _ = measured(name)
    counts = []
    patched, patch = cached(counting(model, counts), plan, PlannedRule(speedup=2.0))
    samples = sample(patched, kind)
    report = patch.last_report
    assert sum(counts) == report.evaluations == 2 * STEPS // 2
    assert report.speedup == pytest.approx(2.0)
    assert [c.label for c in report.conditionings] == ["negative", "positive"] or [
        c.label for c in report.conditionings
    ] == ["positive", "negative"]
    assert torch.isfinite(samples).all() and not torch.equal(samples, plain)
    assert torch.equal(sample(model, kind), plain), "the model itself must be as before"


@pytest.mark.parametrize("name", HOOKED)
def test_blocks_are_skipped_and_embedding_and_output_layers_run(name):
    model = build(name)
    plan, plain = calibrate(model, name, measure="blocks")
    calls = []
    keys = block_keys(model)
    tapped = model.clone()
    for kind, index in (keys[0], keys[-1]):

        def replace(args, extra, at=(kind, index)):
            calls.append(at)
            return extra["original_block"](args)

        tapped.set_model_patch_replace(replace, "dit", kind, index)
    patched, patch = cached(tapped, plan, PlannedRule(speedup=2.0), measure="blocks")
    samples = sample(patched, name)
    computed = patch.last_report.schedule.computed
    assert computed == STEPS // 2
    assert calls.count(keys[0]) == calls.count(keys[-1]) == computed, "another pack's patch is kept"
    assert torch.isfinite(samples).all() and not torch.equal(samples, plain)
    off, _ = cached(model, plan, MagCacheRule(threshold=0.0), measure="blocks")
    assert torch.equal(sample(off, name), plain)


@pytest.mark.parametrize("name", EVERY)
def test_conditionings_batched_or_apart_give_the_same_picture(name, monkeypatch):
    model, kind = world(name)
    patched, patch = cached(model, measured(name)[1], PlannedRule(speedup=2.0))
    together = sample(patched, kind)
    skipped = patch.last_report.schedule.skipped
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 0)
    apart = sample(patched, kind)
    assert patch.last_report.schedule.skipped == skipped
    assert patch.last_report.evaluations == 2 * STEPS // 2
    assert close(apart, together)


@pytest.mark.parametrize("measure", ["latent", "blocks"])
def test_the_calibration_holds_a_curve_for_every_conditioning_and_what_it_was_measured_under(
    measure,
):
    plan, _ = calibrate(build("flux"), "flux", measure=measure)
    assert [curve.label for curve in plan.curves] == ["positive", "negative"]
    assert all(len(curve.ratios) == STEPS for curve in plan.curves)
    conditions = plan.conditions
    assert conditions.steps == STEPS and len(conditions.sigmas) == STEPS + 1
    assert (conditions.model, conditions.sampler, conditions.cfg) == ("Flux", "euler", 2.0)
    assert conditions.resolution == (16, 16) and conditions.frames is None
    assert conditions.measure == measure and conditions.patches == "none"


def test_a_video_calibration_knows_its_frames():
    plan, _ = calibrate(build("wan"), "wan")
    assert plan.conditions.frames == 3 and plan.conditions.resolution == (8, 8)


def test_published_ratios_run_on_the_model_they_do_not_know():
    patched, patch = cached(build("lumina2"), ones(50))
    sample(patched, "lumina2")
    assert patch.last_report.schedule.skipped == (1, 2, 4, 5)
