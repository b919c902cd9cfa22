"""The presets against musubi-tuner's table of layers, on ComfyUI's own networks."""

import comfy.ldm.flux.model
import comfy.ldm.hidream_o1.model
import comfy.ldm.hunyuan_video.model
import comfy.ldm.ideogram4.model
import comfy.ldm.kandinsky5.model
import comfy.ldm.krea2.model
import comfy.ldm.lumina.model
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import comfy.ops
import pytest
import torch
from tiny_models import MODELS

from comfyui_braid.engine.comfyui.differentiable.frozen import is_linear
from comfyui_braid.engine.fp8.policy import PRESETS, Fp8Policy

MUSUBI = {
    "wan2.1": (
        ["blocks"],
        "norm patch_embedding text_embedding time_embedding time_projection head modulation "
        "img_emb".split(),
    ),
    "flux": (["single_blocks", "double_blocks"], ["norm", "mod"]),
    "flux2": (
        ["double_blocks", "single_blocks"],
        ["norm", "pe_embedder", "time_in", "_modulation"],
    ),
    "qwen_image": (["transformer_blocks"], ["norm", "time_text_embed"]),
    "lumina2": (
        ["layers.", "noise_refiner.", "context_refiner."],
        ["_modulation", ".norm_", "_norm"],
    ),
    "hunyuan_video_1.5": (["double_blocks"], ["norm", "_emb"]),
    "kandinsky5": (
        ["visual_transformer_blocks", "text_transformer_blocks", "out_layer"],
        ["norm"],
    ),
    "hidream_o1": (
        "language_model.layers visual.blocks visual.merger visual.deepstack_merger_list "
        "t_embedder1 x_embedder final_layer2".split(),
        "norm rotary pos_embed embed_tokens lm_head".split(),
    ),
    "krea2": (["blocks."], ["mod.", "norm", "txtfusion"]),
    "ideogram4": (["layers."], ["norm", "adaln"]),
}
"""Its substrings of a weight's key (target, exclude): musubi-tuner 30c658c."""

LDM = comfy.ldm
FLUX = MODELS["flux"].unet_config
FLUX2 = dict(
    image_model="flux2",
    axes_dim=[32] * 4,
    vec_in_dim=None,
    qkv_bias=False,
    ops_bias=False,
    global_modulation=True,
    mlp_silu_act=True,
)
HUNYUAN = MODELS["hunyuan_video"].unet_config
HUNYUAN_1_5 = dict(
    vec_in_dim=None,
    byt5=True,
    vision_in_dim=64,
    use_cond_type_embedding=True,
    meanflow_sum=True,
    depth_single_blocks=0,
)
WAN = {**MODELS["wan"].unet_config, "num_layers": 2}
NETWORKS = {
    "flux": ("flux", LDM.flux.model.Flux, FLUX),
    "flux2": ("flux2", LDM.flux.model.Flux, {**FLUX, **FLUX2}),
    "wan t2v": ("wan2.1", LDM.wan.model.WanModel, WAN),
    "wan i2v": ("wan2.1", LDM.wan.model.WanModel, {**WAN, "model_type": "i2v"}),
    "wan vace": (
        "wan2.1",
        LDM.wan.model.VaceWanModel,
        {**WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 16},
    ),
    "qwen_image": (
        "qwen_image",
        LDM.qwen_image.model.QwenImageTransformer2DModel,
        {**MODELS["qwen_image"].unet_config, "use_additional_t_cond": True},
    ),
    "z_image": (
        "lumina2",
        LDM.lumina.model.NextDiT,
        {**MODELS["lumina2"].unet_config, "z_image_modulation": True, "siglip_feat_dim": 32},
    ),
    "hunyuan_video_1.5": (
        "hunyuan_video_1.5",
        LDM.hunyuan_video.model.HunyuanVideo,
        {**HUNYUAN, **HUNYUAN_1_5},
    ),
    "kandinsky5": (
        "kandinsky5",
        LDM.kandinsky5.model.Kandinsky5,
        dict(in_visual_dim=16, out_visual_dim=16, num_text_blocks=1, num_visual_blocks=1),
    ),
    "hidream_o1": ("hidream_o1", LDM.hidream_o1.model.HiDreamO1Transformer, {}),
    "krea2": ("krea2", LDM.krea2.model.SingleStreamDiT, dict(layers=1)),
    "ideogram4": ("ideogram4", LDM.ideogram4.model.Ideogram4Transformer2DModel, dict(num_layers=1)),
}


def linear_names(network, settings):
    """Names of all Linears of a network that takes no memory."""
    built = network(
        **settings,
        device="meta",
        dtype=torch.bfloat16,
        operations=comfy.ops.disable_weight_init,
    )
    return [name for name, module in built.named_modules() if is_linear(module)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_preset_quantises_exactly_the_linears_of_musubis_table(name):
    architecture, network, settings = NETWORKS[name]
    names = linear_names(network, settings)
    targets, excluded = MUSUBI[architecture]
    expected = {
        layer
        for layer in names
        if any(target in f"{layer}.weight" for target in targets)
        and not any(word in f"{layer}.weight" for word in excluded)
    }
    decided = Fp8Policy().decide(names, architecture)
    assert {layer for layer in names if decided[layer].quantize} == expected
    assert expected


def test_every_row_of_musubis_table_has_a_preset_and_a_network():
    assert set(MUSUBI) == {architecture for architecture, *_ in NETWORKS.values()}
    assert set(MUSUBI) <= set(PRESETS)
