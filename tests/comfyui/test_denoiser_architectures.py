"""Architectures beyond the tiny models: nothing in the denoiser knows any of them by name."""

import inspect
from contextlib import contextmanager

import comfy.model_management as mm
import comfy.supported_models
import pytest
import tiny_models
import torch
from comfy.model_sampling import CONST
from denoiser_cases import (
    batch,
    gradients,
    loss_of,
    plain_autograd,
    relative_error,
    state_of,
    training,
)
from tiny_models import FLUX, TinyModel, build, conditioning, latent, sampled

from comfyui_braid.engine.comfyui.differentiable.denoiser import training_session

FLUX2 = {
    **FLUX,
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "mlp_ratio": 3.0,
    "vec_in_dim": None,
    "qkv_bias": False,
    "ops_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "txt_ids_dims": [3],
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
CHROMA = {
    **{key: value for key, value in FLUX.items() if key != "guidance_embed"},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 128,
    "hidden_dim": 64,
    "n_layers": 2,
}
REFERENCE = {"reference_latents": [torch.ones(1, 16, 8, 8)]}
MORE = {
    "flux2": TinyModel("Flux2", FLUX2, (128, 8, 8), 64),
    "kontext": TinyModel("FluxSchnell", FLUX, (16, 16, 16), 64, 32, REFERENCE),
    "flux2, reference at time zero": TinyModel(
        "Flux2",
        FLUX2,
        (128, 8, 8),
        64,
        None,
        {
            "reference_latents": [torch.ones(1, 128, 4, 4)],
            "reference_latents_method": "index_timestep_zero",
        },
    ),
    "chroma": TinyModel("Chroma", CHROMA, (16, 16, 16), 64),
    "krea2": TinyModel(
        "Krea2",
        dict(
            image_model="krea2",
            features=128,
            heads=2,
            kvheads=1,
            layers=3,
            tdim=64,
            txtdim=32,
            txtlayers=2,
            txtheads=1,
            txtkvheads=1,
        ),
        (16, 1, 8, 8),
        64,
    ),
    "kandinsky5": TinyModel(
        "Kandinsky5",
        dict(
            image_model="kandinsky5",
            in_text_dim=64,
            in_text_dim2=32,
            time_dim=64,
            model_dim=128,
            ff_dim=256,
            num_text_blocks=1,
            num_visual_blocks=2,
        ),
        (16, 3, 8, 8),
        64,
        pooled_dim=32,
    ),
    "ideogram4": TinyModel(
        "Ideogram4",
        dict(
            image_model="ideogram4",
            in_channels=128,
            num_layers=2,
            num_attention_heads=1,
            attention_head_dim=128,
            intermediate_size=256,
            adaln_dim=64,
            llm_features_dim=64,
        ),
        (128, 8, 8),
        64,
    ),
    "ltxv": TinyModel(
        "LTXV",
        dict(
            image_model="ltxv",
            cross_attention_dim=128,
            attention_head_dim=64,
            num_attention_heads=2,
            caption_channels=64,
            num_layers=2,
        ),
        (128, 3, 4, 4),
        64,
        extra_cond={"attention_mask": torch.ones(1, 6, dtype=torch.long)},
    ),
}


@pytest.fixture(autouse=True)
def _more(monkeypatch):
    monkeypatch.setattr(tiny_models, "MODELS", tiny_models.MODELS | MORE)
    monkeypatch.setattr(comfy.supported_models.Ideogram4, "unet_extra_config", {})  # its real size


@pytest.mark.parametrize("name", MORE)
def test_gradients_are_plain_autograds_with_and_without_checkpointing(name):
    expected = plain_autograd(build(name), name)
    for checkpointing in (False, True):
        with torch.inference_mode():
            found = gradients(
                build(name), name, everything=True, gradient_checkpointing=checkpointing
            )
        assert relative_error(found, expected) < 1e-5
    assert sum(g is not None and bool(g.abs().max() > 0) for g in expected.values()) > 10


@pytest.mark.parametrize("name", MORE)
def test_the_model_is_left_as_it_was(name):
    with torch.inference_mode():
        patcher = build(name)
    before, state = sampled(patcher, name), state_of(patcher)
    gradients(patcher, name, gradient_checkpointing=True)
    assert state_of(patcher) == state and not mm.in_training
    assert torch.equal(sampled(patcher, name), before)


def test_a_model_that_adds_in_place_to_an_adapters_input_is_guarded():
    """LTXV's cross attention reads the residual stream unnormed, then the block adds to it."""
    with training(build("ltxv"), everything=True) as (denoiser, _):
        assert not torch.autograd.graph._allow_mutation_on_saved_tensors_enabled
        loss_of(denoiser, *batch(denoiser, "ltxv")).backward()
        assert torch.autograd.graph._allow_mutation_on_saved_tensors_enabled
    assert not torch.autograd.graph._allow_mutation_on_saved_tensors_enabled


EMBED_GUIDANCE = {"flux_dev", "hunyuan_video"}


@contextmanager
def received(network):
    """Everything the network is called with meanwhile, by the names of its own signature."""
    calls = []

    def note(_module, args, kwargs):
        given = inspect.signature(network.forward).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        calls.append(
            {k: v for k, v in given.items() if k not in ("transformer_options", "control")}
        )

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def alike(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


@pytest.mark.parametrize("name", [*tiny_models.MODELS, *MORE])
def test_in_training_a_network_receives_what_it_receives_in_sampling_but_for_a_set_guidance(name):
    patcher, inputs = build(name), []
    tapped = patcher.clone()
    tapped.set_model_unet_function_wrapper(
        lambda apply, call: (
            inputs.append((call["input"].clone(), call["timestep"].clone())),
            apply(call["input"], call["timestep"], **call["c"]),
        )[1]
    )
    with received(patcher.model.diffusion_model) as in_sampling:
        sampled(tapped, name, steps=2)
    levels = inputs if isinstance(patcher.model.model_sampling, CONST) else inputs[:1]
    for guidance in (None, 1.0):
        with training_session(patcher, compute_dtype=torch.float32, guidance=guidance) as denoiser:
            _, told = denoiser.prepare(torch.zeros_like(latent(name)), conditioning(name, 0))
            with received(denoiser.diffusion_model) as in_training, torch.no_grad():
                for x, sigma in levels:
                    denoiser.raw_output(x, sigma.clamp(max=1.0), [told])
        assert len(in_training) == len(levels)
        for ours, hosts in zip(in_training, in_sampling, strict=False):
            assert ours.keys() == hosts.keys()
            different = {key for key in ours if not alike(ours[key], hosts[key])}
            assert different == ({"guidance"} if guidance and name in EMBED_GUIDANCE else set())
