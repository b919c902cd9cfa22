"""Everything a graph may do around a MagCache: conditionings, samplers, ranges, other nodes."""

import contextlib
import gc
import itertools
import weakref

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from magcache_runs import (
    GREEDY,
    STEPS,
    cached,
    calibrate,
    close,
    counting,
    sample,
    sample_levels,
)
from tiny_models import build, conditioning, latent
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_braid.engine.comfyui.magcache.calibrate import Calibrator
from comfyui_braid.engine.comfyui.magcache.conditions import schedule_knots
from comfyui_braid.engine.comfyui.magcache.samplers import (
    OWN_LEVELS,
    adds_noise,
    calls_follow_schedule,
    noisy_by_name,
    sampler_name,
)
from comfyui_braid.engine.comfyui.magcache.wrappers import evaluations_of
from comfyui_braid.engine.comfyui.playground import load_playground_model
from comfyui_braid.engine.magcache.clock import same_level
from comfyui_braid.engine.magcache.presets import preset_named, presets
from comfyui_braid.engine.magcache.residuals import ResidualCache
from comfyui_braid.engine.magcache.rules import MagCacheRule, MagCacheSettings, PlannedRule
from comfyui_braid.engine.magcache.schedule import plan_schedule
from comfyui_braid.nodes.magcache.live import planned_strip

SKIPPED = (1, 2, 4, 5)


@pytest.fixture
def model():
    return build("flux")


def labels(patch):
    return {c.label: (c.computed, c.skipped) for c in patch.last_report.conditionings}


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

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", outer)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", predict)
    sample(model, "flux", steps=4, cfg=1.0, sampler=sampler)
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


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun", "dpmpp_sde", "dpmpp_2m"])
def test_calibrations_of_every_kind_of_sampler_are_whole(sampler, model):
    plan, _ = calibrate(model, "flux", sampler=sampler)
    assert plan.calibrated and len(plan.inner_products) == STEPS


def test_a_sampler_off_the_schedule_cannot_calibrate_and_says_so(model):
    with pytest.raises(ValueError, match="did not call the model at all .* calibrate with euler"):
        calibrate(model, "flux", sampler="dpm_adaptive", cfg=1.0)


SEVERAL_CALLS = (
    "heun heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde dpm_2 dpm_2_ancestral dpmpp_2s_ancestral "
    "dpmpp_2s_ancestral_cfg_pp dpmpp_sde seeds_2 seeds_3 sa_solver_pece uni_pc"
).split()


@pytest.mark.parametrize("sampler", SEVERAL_CALLS)
def test_extrapolation_stays_near_the_picture_with_samplers_that_call_several_times(sampler):
    """Two calls at one noise level, a rounding apart, make no line to follow."""
    model = load_playground_model()
    plan, _ = calibrate(model, "flux", steps=12)
    plain = sample(model, "flux", steps=12, sampler=sampler)
    patched, patch = cached(model, plan, PlannedRule(speedup=1.5))
    samples = sample(patched, "flux", steps=12, sampler=sampler)
    assert len(patch.last_report.skipped_steps) == 4
    assert float((samples - plain).norm()) < float(plain.norm())


def test_residuals_of_one_noise_level_replace_each_other_whatever_its_rounding():
    cache = ResidualCache(extrapolate=True)
    for step, sigma in ((1, 0.9), (5, 0.5), (5, 0.5 * (1 + 1e-6))):
        cache.store("who", step, sigma, torch.full((1,), sigma))
    newest, before, w = cache.line("who", 0.4)
    assert (before.sigma, w) == (0.9, pytest.approx(0.25, rel=1e-4))
    assert newest.sigma != 0.5


def test_a_tensor_of_another_shape_type_or_device_never_takes_a_residual():
    who = {"uuids": ["u"], "cond_or_uncond": [0]}
    x = torch.zeros(1, 4)
    others = (torch.zeros(1, 5), torch.zeros(2, 4), x.half(), torch.zeros(1, 4, device="meta"))
    keys = [evaluations_of(who, tensor, {})[0] for tensor in (x, *others)]
    assert len(set(keys)) == len(keys)


LEVELS = {
    "no step": [1.0],
    "one step": [1.0, 0.0],
    "noise added back": [1.0, 0.8, 0.6, 0.4, 0.7, 0.5, 0.3, 0.1, 0.0],
    "the same level twice": [1.0, 0.9, 0.9, 0.7, 0.7, 0.4, 0.2, 0.0],
    "from picture to noise": [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0],
}


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("rule", [GREEDY, PlannedRule(speedup=2.0)], ids=["rule", "planned"])
def test_levels_that_do_not_fall_are_computed_in_full_and_the_run_says_so(
    levels, sampler, rule, model
):
    plan, _ = calibrate(model, "flux")
    patched, patch = cached(model, plan, rule)
    plain = sample_levels(model, levels, sampler)
    samples = sample_levels(patched, levels, sampler)
    assert torch.equal(samples.nan_to_num(7.0), plain.nan_to_num(7.0))
    if len(levels) > 2:
        assert any("do not fall" in warning for warning in patch.last_report.schedule.warnings)


def test_levels_that_do_not_fall_cannot_be_calibrated_on(model):
    calibrating = Calibrator().attach(model)
    with pytest.raises(ValueError, match="the noise levels do not fall"):
        sample_levels(calibrating, LEVELS["noise added back"], "euler")
    no_step = sample_levels(calibrating, LEVELS["no step"], "euler")
    assert torch.equal(no_step, sample_levels(model, LEVELS["no step"], "euler"))


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


def test_img2img_plans_on_its_own_noise_levels(model):
    plan, _ = calibrate(model, "flux", steps=20)
    patched, patch = cached(model, plan, PlannedRule(speedup=2.0))
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


@pytest.mark.parametrize("sampler", ["dpm_fast", "dpm_adaptive"])
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_a_sampler_with_noise_levels_of_its_own_is_computed_in_full_and_the_run_says_so(
    sampler, model
):
    patched, patch = cached(model)
    assert torch.equal(
        sample(patched, "flux", sampler=sampler), sample(model, "flux", sampler=sampler)
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


def test_a_run_unlike_its_calibration_warns_and_names_the_field(model):
    plan, _ = calibrate(model, "flux", steps=12)
    patched, patch = cached(model, plan, PlannedRule(speedup=2.0))
    sample(patched, "flux", steps=12, cfg=3.0, sampler="dpmpp_2m")
    fields = [warning.split(":")[0] for warning in patch.last_report.schedule.warnings]
    assert fields == ["sampler", "cfg"]


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
    plain = reads(model, 12) - reads(model, 8)
    assert reads(patched, 12) - reads(patched, 8) <= plain


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


def test_memory_stays_at_two_residuals_per_conditioning(model):
    runs = []

    def outer(executor, *args, **kwargs):
        runs.append(executor.class_obj.model_options["transformer_options"]["braid.magcache"])
        return executor(*args, **kwargs)

    plan, _ = calibrate(model, "flux")
    patched, _ = cached(model, plan, PlannedRule(speedup=2.0))
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", outer)
    sample(patched, "flux")
    (run,) = runs
    assert [len(entries) for entries in run.cache._entries.values()] == [2, 2]
    assert "braid.magcache" not in patched.model_options["transformer_options"]


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


def warnings_of(patch):
    return " / ".join(patch.last_report.schedule.warnings)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde"])
def test_planned_runs_of_samplers_that_add_noise_reuse_and_say_so(sampler, model):
    plan, _ = calibrate(model, "flux", steps=12)
    patched, patch = cached(model, plan, PlannedRule(speedup=2.0))
    extrapolating = sample(patched, "flux", steps=12, sampler=sampler)
    assert not patch.last_report.schedule.extrapolate
    assert f"{sampler} adds noise, which would be extrapolated" in warnings_of(patch)
    patched, patch = cached(model, plan, PlannedRule(speedup=2.0, predict="reuse"))
    assert torch.equal(sample(patched, "flux", steps=12, sampler=sampler), extrapolating)
    assert "adds noise" not in warnings_of(patch)


def test_without_noise_the_planned_rule_extrapolates_as_told(model):
    plan, _ = calibrate(model, "flux", steps=12)
    patched, patch = cached(model, plan, PlannedRule(speedup=2.0))
    sample(patched, "flux", steps=12, sampler="dpmpp_2m")
    assert patch.last_report.schedule.extrapolate and "adds noise" not in warnings_of(patch)


def test_a_calibration_under_noise_is_told_to_the_planned_rule(model):
    plan, _ = calibrate(model, "flux", steps=12, sampler="euler_ancestral")
    told = "calibrated with euler_ancestral, which adds noise: calibrate with euler instead"
    for rule, expected in ((PlannedRule(speedup=2.0), True), (GREEDY, False)):
        patched, patch = cached(model, plan, rule)
        sample(patched, "flux", steps=12)
        assert (told in warnings_of(patch)) == expected
