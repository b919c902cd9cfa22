import weakref

import comfy.model_management as mm
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from denoiser_cases import (
    TRANSFORMERS,
    batch,
    build_fp8,
    gradients,
    loss_of,
    relative_error,
    state_of,
    training,
)
from tiny_models import MODELS, build, conditioning, latent, sampled

from comfyui_braid.engine.comfyui.differentiable.denoiser import training_session

ALL = (*TRANSFORMERS, "sd15")


def with_lora(patcher):
    """The MODEL with a LoRA patched in by ComfyUI's own loader."""
    state = patcher.model.diffusion_model.state_dict()
    generator = torch.Generator().manual_seed(4)
    patches = {}
    for key, weight in state.items():
        if key.endswith(".weight") and weight.ndim == 2 and ".0." in key:
            up = torch.randn(weight.shape[0], 2, generator=generator) * 0.1
            down = torch.randn(2, weight.shape[1], generator=generator) * 0.1
            patches[f"diffusion_model.{key}"] = ("diff", (up @ down,))
    patched = patcher.clone()
    assert patched.add_patches(patches)
    return patched


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_model_samples_bit_for_bit_as_before_and_nothing_is_left_on_it(name, checkpointing):
    with torch.inference_mode():
        patcher = build(name)
    before = sampled(patcher, name, cfg=2.0)
    state = state_of(patcher)
    gradients(patcher, name, gradient_checkpointing=checkpointing)
    assert state_of(patcher) == state
    assert torch.equal(sampled(patcher, name, cfg=2.0), before)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("where", ["prepare", "forward", "backward"])
def test_an_exception_anywhere_restores_everything(where, checkpointing):
    patcher = build("flux")
    before, _ = sampled(patcher, "flux", cfg=2.0), None
    state = state_of(patcher)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with (
        pytest.raises(Stop),
        training(patcher, gradient_checkpointing=checkpointing) as (denoiser, network),
    ):
        if where == "prepare":
            stop()
        data = batch(denoiser, "flux")
        if where == "forward":
            denoiser.diffusion_model.single_blocks[1].linear1.register_forward_hook(stop)
            patcher.model.hooks_to_clear = None
        loss = loss_of(denoiser, *data)
        next(network.parameters()).register_hook(stop)
        loss.backward()
    if where == "forward":
        del patcher.model.hooks_to_clear
        patcher.model.diffusion_model.single_blocks[1].linear1._forward_hooks.clear()
    assert state_of(patcher) == state
    assert torch.equal(sampled(patcher, "flux", cfg=2.0), before)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_models_own_loras_are_trained_on_top_of(name):
    patched = with_lora(build(name))
    before = sampled(patched, name, cfg=2.0)
    found = gradients(patched, name)
    assert torch.equal(sampled(patched, name, cfg=2.0), before)
    assert not torch.equal(sampled(build(name), name, cfg=2.0), before)
    merged = build(name)
    mm.load_models_gpu([patched])
    merged.model.load_state_dict(patched.model.state_dict())
    assert relative_error(found, gradients(merged, name)) < 1e-5


def test_weights_that_the_host_computes_for_each_use_are_fetched_again_in_backward():
    """Patches on the fly, as in low VRAM: the weight that is used exists only while it is used."""
    name, layer = "flux", "single_blocks.1.linear2"
    patcher, doubled = build(name).clone(), build(name)
    calls = []

    def double(weight):
        calls.append(weight.shape)
        return weight * 2

    patcher.add_weight_wrapper(f"diffusion_model.{layer}.weight", double)
    with torch.no_grad():
        doubled.model.diffusion_model.get_submodule(layer).weight.mul_(2)
    found = gradients(patcher, name)
    assert len(calls) == 3  # forward, backward, and the backward of the trial
    assert relative_error(found, gradients(doubled, name)) < 1e-5


BASES = {
    "fp32": lambda: build("flux"),
    "bf16": lambda: build("flux", torch.bfloat16),
    "fp8": lambda: build_fp8("flux"),
}


def storages(patcher):
    """Where the matrices of the model are."""
    matrices = [p for p in patcher.model.diffusion_model.parameters() if p.ndim > 1]
    return [(p._qdata if hasattr(p, "_qdata") else p).data_ptr() for p in matrices]


@pytest.mark.parametrize("weights", BASES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_step_copies_no_base_weight_and_keeps_no_dequantised_one(weights, checkpointing):
    with torch.inference_mode():  # as in the executor
        patcher = BASES[weights]()
        before = storages(patcher)
        shapes = {p.shape for p in patcher.model.diffusion_model.parameters() if p.ndim > 1}
        shapes |= {shape[::-1] for shape in shapes}
        saved = []

        def pack(tensor):
            saved.append(tensor)
            return tensor

        with training(patcher, gradient_checkpointing=checkpointing) as (denoiser, network):
            assert storages(patcher) == before
            adapters = {p.data_ptr() for p in network.parameters()}
            data = batch(denoiser, "flux", size=3)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss_of(denoiser, *data).backward()
            saved = [tensor for tensor in saved if tensor.data_ptr() not in adapters]
        assert len(saved) > 20
        assert not [t.shape for t in saved if t.shape in shapes or t.data_ptr() in before]


def test_what_a_session_copies_of_the_base_is_small():
    with torch.inference_mode():
        patcher = build("flux")
        before = {p.data_ptr(): p.nbytes for p in patcher.model.parameters()}
        with training(patcher):
            copied = [p.nbytes for p in patcher.model.parameters() if p.data_ptr() not in before]
        assert sum(copied) <= 0.05 * sum(before.values())


def test_an_fp8_base_saves_no_more_for_backward_than_a_bf16_base():
    def saved_bytes(patcher):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with training(patcher, dtype=torch.bfloat16) as (denoiser, network):
            data = batch(denoiser, "flux")
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = loss_of(denoiser, *data)
            for parameter in network.parameters():
                storages.pop(parameter.untyped_storage().data_ptr(), None)
            assert loss.requires_grad
        return sum(storages.values())

    assert saved_bytes(build_fp8("flux")) <= 1.05 * saved_bytes(build("flux", torch.bfloat16))


def test_the_wrappers_and_block_patches_of_the_model_are_honoured():
    patcher = build("flux").clone()
    called = []

    def record(kind):
        def wrapper(executor, *args, **kwargs):
            called.append(kind)
            return executor(*args, **kwargs)

        return wrapper

    def block_patch(args, extra):
        called.append("block")
        return extra["original_block"](args)

    def function_wrapper(apply_model, arguments):
        called.append("function")
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", record("apply"))
    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", record("diffusion"))
    patcher.set_model_patch_replace(block_patch, "dit", "double_block", 1)
    patcher.set_model_unet_function_wrapper(function_wrapper)
    found = gradients(patcher, "flux", gradient_checkpointing=True)
    assert called[:4] == ["function", "apply", "diffusion", "block"]
    assert relative_error(found, gradients(build("flux"), "flux")) < 1e-5


def test_guidance_replaces_what_the_conditioning_asks_for():
    def prediction(cond, **session):
        with training_session(
            build("flux_dev"), compute_dtype=torch.float32, **session
        ) as denoiser:
            x, item = denoiser.prepare(latent("flux_dev"), cond)
            with torch.no_grad():
                return denoiser.raw_output(x, torch.tensor([0.5]), [item])

    plain = conditioning("flux_dev")
    asked = [[plain[0][0], plain[0][1] | {"guidance": 1.0}]]
    assert torch.equal(prediction(plain, guidance=1.0), prediction(asked))
    assert torch.equal(prediction(asked, guidance=3.5), prediction(plain))
    assert not torch.equal(prediction(plain), prediction(asked))


@pytest.mark.parametrize("name", ALL)
def test_a_prediction_is_what_sampling_computes_with_the_same_weights(name):
    """The velocity (or epsilon) follows from the host's denoised prediction of the same input."""
    patcher = build(name)
    sampling = patcher.model.model_sampling
    with training_session(patcher, compute_dtype=torch.float32) as denoiser, torch.no_grad():
        latents, noise, t, conds = batch(denoiser, name, size=1)
        noised = denoiser.noised_input(latents, noise, t)
        output = denoiser.raw_output(noised, t, conds)
        from comfyui_braid.engine.comfyui.differentiable import conditioning as ready
        from comfyui_braid.engine.comfyui.differentiable import noise_levels

        sigma = noise_levels.sigma_at(sampling, t)
        arguments = ready.stacked(conds, denoiser.device)
        expected = patcher.model.apply_model(noised, sigma, **arguments)
    denoised = sampling.calculate_denoised(sigma, output, noised)
    assert output.dtype == torch.float32
    torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-4)


def test_the_host_can_sample_between_two_steps_with_the_adapters_attached():
    with torch.inference_mode():
        patcher = build("flux")
        before = sampled(patcher, "flux", cfg=2.0)
        with training(patcher, dtype=torch.float32) as (denoiser, network):
            data = batch(denoiser, "flux")
            loss_of(denoiser, *data).backward()
            first = {n: p.grad.clone() for n, p in network.named_parameters()}
            with denoiser.paused():
                assert not mm.in_training and torch.is_inference_mode_enabled()
                with_adapters = sampled(patcher, "flux", cfg=2.0)
            assert mm.in_training and torch.is_grad_enabled()
            network.zero_grad()
            loss_of(denoiser, *data).backward()
            again = {n: p.grad for n, p in network.named_parameters()}
            assert relative_error(again, first) == 0
        assert not torch.equal(with_adapters, before)
        assert torch.equal(sampled(patcher, "flux", cfg=2.0), before)


def test_other_models_are_unloaded_first_and_the_session_frees_its_graph():
    other, patcher = build("wan"), build("flux")
    mm.load_models_gpu([other])
    with training(patcher) as (denoiser, network):
        assert [m.model for m in mm.current_loaded_models] == [patcher]
        inputs = []
        hook = denoiser.diffusion_model.single_blocks[1].linear1.register_forward_hook(
            lambda module, args, output: inputs.append(weakref.ref(args[0]))
        )
        output = denoiser.raw_output(*_inputs(denoiser))
        assert output.requires_grad and inputs[0]() is not None
        hook.remove()
        del output
    assert inputs[0]() is None


def _inputs(denoiser):
    latents, noise, t, conds = batch(denoiser, "flux")
    return denoiser.noised_input(latents, noise, t), t, conds


def test_unfit_latents_and_conditioning_are_refused_in_one_sentence():
    with training_session(build("flux"), compute_dtype=torch.float32) as denoiser:
        cond = conditioning("flux")
        with pytest.raises(ValueError, match="16 channels.*VAE that belongs"):
            denoiser.prepare(torch.zeros(1, 4, 16, 16), cond)
        with pytest.raises(ValueError, match="one latent, got a batch of 2"):
            denoiser.prepare(latent("flux", 2), cond)
        with pytest.raises(ValueError, match="exactly one prompt.*has 2"):
            denoiser.prepare(latent("flux"), cond * 2)
        with pytest.raises(ValueError, match="a mask"):
            denoiser.prepare(latent("flux"), [[cond[0][0], {"mask": torch.ones(1, 4, 4)}]])
        good = denoiser.prepare(latent("flux"), cond)
        denoiser.check([good])
        wrong = denoiser.prepare(latent("flux"), [[torch.zeros(1, 6, 32), cond[0][1]]])
        with pytest.raises(ValueError, match="c_crossattn 32 wide.*text encoder that belongs"):
            denoiser.check([good, wrong])


def test_an_image_latent_is_taken_by_a_video_model():
    with training_session(build("wan"), compute_dtype=torch.float32) as denoiser:
        latents, _ = denoiser.prepare(torch.zeros(1, 16, 8, 8), conditioning("wan"))
    assert latents.shape == (1, 16, 1, 8, 8)


def test_latents_are_brought_to_the_models_own_scale():
    patcher = build("flux")
    with training_session(patcher, compute_dtype=torch.float32) as denoiser:
        latents, _ = denoiser.prepare(latent("flux"), conditioning("flux"))
    assert torch.equal(latents, patcher.model.process_latent_in(latent("flux")))
    assert MODELS["flux"].latent_shape == tuple(latents.shape[1:])
