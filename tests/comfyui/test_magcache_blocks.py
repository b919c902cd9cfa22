"""`measure = blocks` on a tiny model of every class whose blocks it skips."""

import pytest
import torch
from magcache_runs import cached, sample
from tiny_models import MODELS, TinyModel, build, conditioning

from comfyui_braid.engine.comfyui.magcache.blocks import (
    HOOKED_MODELS,
    StackMeasure,
    block_keys,
    skipping_hooks,
    with_hooks,
)

FLUX = MODELS["flux"].unet_config
WAN = MODELS["wan"].unet_config
HUNYUAN = MODELS["hunyuan_video"].unet_config
FLUX2 = dict(
    image_model="flux2",
    axes_dim=[32] * 4,
    vec_in_dim=None,
    qkv_bias=False,
    ops_bias=False,
    global_modulation=True,
    mlp_silu_act=True,
    in_channels=128,
    out_channels=128,
    patch_size=1,
    txt_ids_dims=[3],
)
CHROMA = dict(
    image_model="chroma",
    in_channels=64,
    out_channels=64,
    in_dim=64,
    out_dim=128,
    hidden_dim=128,
    n_layers=1,
    vec_in_dim=None,
)
HUNYUAN_1_5 = dict(
    vec_in_dim=None,
    in_channels=65,
    out_channels=32,
    byt5=True,
    vision_in_dim=64,
    use_cond_type_embedding=True,
    meanflow_sum=True,
    depth_single_blocks=0,
    guidance_embed=False,
)
HUNYUAN_IMAGE = dict(patch_size=[2, 2], axes_dim=[64, 64], vec_in_dim=None, guidance_embed=False)
CHROMA_FLUX = {key: value for key, value in FLUX.items() if key != "guidance_embed"}
VIDEO = (16, 3, 8, 8)
MORE = {
    "flux2": TinyModel("Flux2", {**FLUX, **FLUX2}, (128, 8, 8), 64),
    "chroma": TinyModel("Chroma", {**CHROMA_FLUX, **CHROMA}, (16, 16, 16), 64),
    "wan_i2v": TinyModel("WAN21_I2V", {**WAN, "model_type": "i2v", "in_dim": 36}, VIDEO, 64),
    "wan_camera": TinyModel(
        "WAN21_Camera", {**WAN, "model_type": "camera", "in_dim": 32}, VIDEO, 64
    ),
    "wan_2.2": TinyModel("WAN22_T2V", {**WAN, "in_dim": 48, "out_dim": 48}, (48, 3, 8, 8), 64),
    "wan_vace": TinyModel(
        "WAN21_Vace", {**WAN, "model_type": "vace", "vace_in_dim": 96, "vace_layers": 3}, VIDEO, 64
    ),
    "hunyuan_i2v": TinyModel("HunyuanVideoI2V", {**HUNYUAN, "in_channels": 33}, VIDEO, 64, 32),
    "hunyuan_1.5": TinyModel("HunyuanVideo15", {**HUNYUAN, **HUNYUAN_1_5}, (32, 3, 8, 8), 64, 32),
    "hunyuan_image": TinyModel("HunyuanImage21", {**HUNYUAN, **HUNYUAN_IMAGE}, (16, 16, 16), 64),
}
HOOKED = ("flux", "flux_dev", "wan", "qwen_image", "hunyuan_video", *MORE)
HOOKED = tuple(name for name in HOOKED if name != "wan_vace")


@pytest.fixture(autouse=True)
def more_models(monkeypatch):
    for name, tiny in MORE.items():
        monkeypatch.setitem(MODELS, name, tiny)


def test_every_model_whose_blocks_are_skipped_is_tried_here():
    assert {type(build(name).model).__name__ for name in HOOKED} == HOOKED_MODELS


@pytest.mark.parametrize("name", HOOKED)
def test_adding_the_measured_residual_gives_the_blocks_output(name):
    """A residual stored at a step and used at the same step reproduces the network's output."""
    model = build(name)
    keys = block_keys(model)
    seen = []

    def thrice(executor, *args, **kwargs):
        options = args[5]
        stack = StackMeasure(keys)
        computed = executor(*args[:5], with_hooks(options, stack.hooks()), **kwargs)
        hooks = skipping_hooks(keys, lambda hidden: stack.residual)
        skipped = executor(*args[:5], with_hooks(options, hooks), **kwargs)
        assert torch.equal(executor(*args, **kwargs), computed), "measuring changes nothing"
        seen.append(float((computed - skipped).abs().max()))
        return computed

    tapped = model.clone()
    tapped.add_wrapper_with_key("apply_model", "test", thrice)
    sample(tapped, name, steps=2)
    assert len(seen) >= 2 and max(seen) < 1e-4


@pytest.mark.parametrize("name", ["lumina2", "sd15", "wan_vace"])
def test_other_models_are_refused_and_the_other_measure_is_named(name):
    with pytest.raises(ValueError, match="no hooks around its block stack.*use measure 'latent'"):
        cached(build(name), measure="blocks")


def test_vace_runs_with_the_whole_models_output():
    hints = dict(
        vace_frames=[torch.randn(1, 32, 3, 8, 8)],
        vace_mask=[torch.randn(1, 64, 3, 8, 8)],
        vace_strength=[1.0],
    )
    positive, negative = conditioning("wan_vace", 0), conditioning("wan_vace", 1)
    for conditions in (positive, negative):
        conditions[0][1].update(hints)
    patched, patch = cached(build("wan_vace"))
    samples = sample(patched, "wan_vace", positive=positive, negative=negative)
    assert torch.isfinite(samples).all() and patch.last_report.skipped_steps == (1, 2, 4, 5)
