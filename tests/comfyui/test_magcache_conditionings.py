"""Every conditioning keeps its own residual: regions, frames, batches, ControlNets, guidance."""

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import pytest
import torch
from magcache_runs import (
    SKIPPED,
    STEPS,
    cached,
    close,
    counting,
    labels,
    sample,
    small_flux,
)
from tiny_models import build, conditioning, latent

from comfyui_braid.engine.comfyui.magcache.wrappers import evaluations_of


@pytest.fixture(scope="module")
def model():
    return small_flux()


def test_a_tensor_of_another_shape_type_or_device_never_takes_a_residual():
    who = {"uuids": ["u"], "cond_or_uncond": [0]}
    x = torch.zeros(1, 4)
    others = (torch.zeros(1, 5), torch.zeros(2, 4), x.half(), torch.zeros(1, 4, device="meta"))
    keys = [evaluations_of(who, tensor, {})[0] for tensor in (x, *others)]
    assert len(set(keys)) == len(keys)


def test_cfg_1_has_one_conditioning(model):
    patched, patch = cached(model)
    sample(patched, "flux", cfg=1.0)
    assert labels(patch) == {"positive": ((0, 3, 6, 7), SKIPPED)}


def regional():
    left, right = conditioning("flux", 0), conditioning("flux", 2)
    left[0][1]["area"], left[0][1]["strength"] = (16, 8, 0, 0), 1.0
    right[0][1]["area"], right[0][1]["strength"] = (16, 12, 0, 4), 0.7
    return left + right


def test_regional_prompts_each_keep_their_own_residual(model):
    counts = []
    patched, patch = cached(counting(model, counts))
    samples = sample(patched, "flux", positive=regional())
    regions = {"positive", "positive 2", "negative", "negative 2", "negative 3"}
    assert set(labels(patch)) == regions, "core makes a negative for every region"
    assert all(skipped == SKIPPED for _, skipped in labels(patch).values())
    assert sum(counts) == 5 * 4 and torch.isfinite(samples).all()


def test_a_region_and_the_negative_that_core_makes_for_it_are_told_apart():
    """They carry the same uuid."""
    keys = evaluations_of({"uuids": ["u", "u"], "cond_or_uncond": [1, 0]}, torch.zeros(2, 4), {})
    apart = evaluations_of({"uuids": ["u"], "cond_or_uncond": [0]}, torch.zeros(1, 4), {})
    assert keys[1] == apart[0] != keys[0]


def test_regional_prompts_batched_or_apart_give_the_same_picture(model, monkeypatch):
    positive = regional()
    for prompt in positive:
        prompt[1]["area"] = (16, 8, 0, 4)
    patched, _ = cached(model)
    together = sample(patched, "flux", positive=positive)
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 0)
    assert close(sample(patched, "flux", positive=positive), together)


def test_a_conditioning_that_starts_in_mid_run_is_computed_before_it_is_skipped(model):
    early, late = conditioning("flux", 0), conditioning("flux", 2)
    early[0][1].update(start_percent=0.0, end_percent=0.5)
    late[0][1].update(start_percent=0.5, end_percent=1.0)
    patched, patch = cached(model)
    samples = sample(patched, "flux", positive=early + late)
    computed, skipped = labels(patch)["positive 2"]
    assert computed[0] == 4 and 4 not in skipped, "step 4 is to be skipped but nothing is known yet"
    assert 5 in skipped and torch.isfinite(samples).all()


def test_batches_and_video_are_skipped_alike(model):
    patched, patch = cached(model)
    noise = latent("flux", batch=3)
    batch = sample(patched, "flux", noise=noise)
    alone = sample(patched, "flux", noise=noise[1:2])
    assert close(batch[1:2], alone)
    video, patch = cached(build("wan"))
    sample(video, "wan")
    assert patch.last_report.schedule.skipped == SKIPPED


class TinyControl(comfy.controlnet.ControlBase):
    """A ControlNet that adds nothing and counts."""

    calls = 0

    def get_control(self, *args):
        TinyControl.calls += 1
        return {"input": [], "middle": [], "output": []}

    def copy(self):
        return self


def test_a_conditioning_with_controlnet_is_computed_at_every_step(model):
    positive = conditioning("flux", 0)
    positive[0][1]["control"] = TinyControl()
    patched, patch = cached(model)
    samples = sample(patched, "flux", positive=positive)
    assert labels(patch)["positive"] == (tuple(range(STEPS)), ())
    assert labels(patch)["negative"][1] == SKIPPED
    report = patch.last_report.to_dict()
    assert report["skipped_steps"] == [] and report["computed_steps"] == STEPS
    assert torch.isfinite(samples).all()


class ControlAtStep3(TinyControl):
    """As core's own, it gives nothing outside its range of the run."""

    def get_control(self, x, timestep, *args):
        return super().get_control() if 0.6 < float(timestep[0]) < 0.64 else None


@pytest.mark.parametrize("measure", ["latent", "blocks"])
def test_after_a_controlnet_has_acted_nothing_from_before_it_is_used(measure, model):
    positive = conditioning("flux", 0)
    positive[0][1]["control"] = ControlAtStep3()
    patched, patch = cached(model, measure=measure)
    sample(patched, "flux", positive=positive)
    assert labels(patch) == {
        "positive": ((0, 3, 4, 6, 7), (1, 2, 5)),
        "negative": ((0, 3, 6, 7), SKIPPED),
    }


@pytest.mark.parametrize("measure", ["latent", "blocks"])
def test_memory_that_shrinks_in_mid_run_splits_the_batch_and_changes_nothing(
    measure, model, monkeypatch
):
    patched, patch = cached(model, measure=measure)
    together = sample(patched, "flux")
    free = type(model).get_free_memory
    asked = []

    def shrinks(self, device):
        asked.append(device)
        return 0 if len(asked) % 3 else free(self, device)

    monkeypatch.setattr(type(model), "get_free_memory", shrinks)
    assert close(sample(patched, "flux"), together)
    assert labels(patch)["negative"] == labels(patch)["positive"] == ((0, 3, 6, 7), SKIPPED)


def test_a_guidance_node_that_evaluates_twice_does_not_mix_the_residuals(model):
    """Skip-layer guidance and the like call the same conditioning again with other options."""

    def again(args):
        with_other_options = {
            "transformer_options": dict(args["model_options"]["transformer_options"])
        }
        with_other_options["transformer_options"]["patches_replace"] = {
            "dit": {("double_block", 0): lambda a, e: {"img": a["img"], "txt": a["txt"]}}
        }
        comfy.samplers.calc_cond_batch(
            args["model"],
            [args["input_cond"] if "input_cond" in args else args["cond"]],
            args["input"],
            args["sigma"],
            with_other_options,
        )
        return args["denoised"]

    patched, _ = cached(model)
    plain = sample(patched, "flux")
    guided = patched.clone()
    guided.set_model_sampler_post_cfg_function(again)
    assert close(sample(guided, "flux"), plain)


def test_frames_of_another_context_window_are_another_residual():
    class Window:
        def __init__(self, *frames):
            self.index_list = list(frames)

    x, calls = torch.zeros(1, 4), {}
    who = {"uuids": ["u"], "cond_or_uncond": [0]}
    first = evaluations_of({**who, "context_window": Window(0, 1)}, x, calls)
    second = evaluations_of({**who, "context_window": Window(1, 2)}, x, calls)
    again = evaluations_of({**who, "context_window": Window(0, 1)}, x, {})
    assert first != second and first == again
