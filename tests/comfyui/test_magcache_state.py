"""The state of a run is born with it and gone after it; other caches and compilers beside it."""

import contextlib
import gc
import weakref

import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from magcache_runs import (
    SKIPPED,
    STEPS,
    cached,
    close,
    flux_plan,
    sample,
    small_flux,
)
from tiny_models import latent

from comfyui_braid.engine.comfyui.magcache.calibrate import Calibrator
from comfyui_braid.engine.magcache.rules import MagCacheRule, PlannedRule


@pytest.fixture(scope="module")
def model():
    return small_flux()


def test_an_interrupted_run_leaves_nothing_behind(model):
    patched, patch = cached(model)
    fresh = sample(patched, "flux")

    def stop(step, *_):
        if step == 4:
            raise InterruptProcessingException()

    with pytest.raises(InterruptProcessingException):
        sample(patched, "flux", callback=stop)
    assert patch.last_report is None
    assert torch.equal(sample(patched, "flux"), fresh)


def test_two_caches_in_one_graph_do_not_touch_each_other(model):
    one, patch_one = cached(model)
    two, patch_two = cached(model, rule=MagCacheRule(threshold=1.0, retention_ratio=0.5, k=1))
    alone = sample(two, "flux")
    sample(one, "flux")
    assert torch.equal(sample(two, "flux"), alone)
    assert patch_one.last_report.schedule.skipped != patch_two.last_report.schedule.skipped


def test_the_second_cache_on_a_model_replaces_the_first(model):
    first, _ = cached(model)
    second, patch = cached(first, rule=MagCacheRule(threshold=0.0))
    assert torch.equal(sample(second, "flux"), sample(model, "flux"))
    assert patch.last_report.evaluations == 2 * STEPS


def test_another_resolution_in_the_next_run_is_no_trouble(model):
    patched, patch = cached(model)
    sample(patched, "flux")
    small = sample(patched, "flux", noise=latent("flux")[..., :8, :12])
    assert small.shape[-2:] == (8, 12) and patch.last_report.schedule.skipped == SKIPPED


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
@pytest.mark.parametrize("measure", ["latent", "blocks"])
def test_the_residuals_are_freed_with_the_run(measure, fails, model):
    alive, calls = weakref.WeakSet(), []

    def outer(executor, *args, **kwargs):
        run = executor.class_obj.model_options["transformer_options"]["braid.magcache"]
        alive.add(run.cache)
        return executor(*args, **kwargs)

    def compute(executor, *args, **kwargs):
        calls.append(1)
        if fails and len(calls) == 2:
            raise torch.OutOfMemoryError("not enough memory")
        return executor(*args, **kwargs)

    patched, patch = cached(model, measure=measure)
    fresh = sample(patched, "flux")
    tapped = patched.clone()
    tapped.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", outer)
    tapped.add_wrapper_with_key("diffusion_model", "test", compute)
    with pytest.raises(torch.OutOfMemoryError) if fails else contextlib.nullcontext():
        sample(tapped, "flux")
    gc.collect()
    assert calls and not alive
    assert (patch.last_report is None) == fails
    assert torch.equal(sample(patched, "flux"), fresh)


@pytest.mark.parametrize(
    ("node", "name"), [(EasyCacheNode, "EasyCache"), (LazyCacheNode, "LazyCache")]
)
def test_another_cache_on_the_model_is_refused_by_its_name_before_and_after(model, node, name):
    other = node.execute(model, 0.2, 0.15, 0.95, False).args[0]
    with pytest.raises(ValueError, match=f"{name}.* is already on this model"):
        cached(other)
    patched, _ = cached(model)
    later = node.execute(patched, 0.2, 0.15, 0.95, False).args[0]
    with pytest.raises(ValueError, match=f"{name}.* is already on this model"):
        sample(later, "flux")


def test_a_calibrating_model_takes_no_cache_and_takes_off_the_one_it_had(model):
    with pytest.raises(ValueError, match="comes from MagCache Calibrate"):
        cached(Calibrator().attach(model))
    patched, _ = cached(model)
    calibrator = Calibrator()
    assert torch.equal(sample(calibrator.attach(patched), "flux"), sample(model, "flux"))


def test_a_compiled_model_sees_nothing_of_the_cache(model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patched, patch = cached(model)
    plain = sample(patched, "flux")
    set_torch_compile_wrapper(patched, backend="eager", keys=["diffusion_model.single_blocks.0"])
    assert close(sample(patched, "flux"), plain)
    assert patch.last_report.schedule.skipped == SKIPPED


def test_memory_stays_at_two_residuals_per_conditioning(model):
    runs = []

    def outer(executor, *args, **kwargs):
        runs.append(executor.class_obj.model_options["transformer_options"]["braid.magcache"])
        return executor(*args, **kwargs)

    patched, _ = cached(model, flux_plan(), PlannedRule(speedup=2.0))
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", outer)
    sample(patched, "flux")
    (run,) = runs
    assert [len(entries) for entries in run.cache._entries.values()] == [2, 2]
    assert "braid.magcache" not in patched.model_options["transformer_options"]
