"""The table of architectures, held to ComfyUI's real models."""

import re

import comfy.lora
import comfy.ops
import comfy.supported_models
import pytest
import torch
from comfy.ldm.aura.mmdit import MMDiT
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.ideogram4.model import Ideogram4Transformer2DModel
from comfy.ldm.kandinsky5.model import Kandinsky5
from comfy.ldm.krea2.model import SingleStreamDiT
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from tiny_models import FLUX, MODELS, build

from comfyui_braid.engine.comfyui.model import architecture_of, diffusion_model_of
from comfyui_braid.engine.network import architectures
from comfyui_braid.engine.network.adapter_file import state_dict_of
from comfyui_braid.engine.network.attach import build_network
from comfyui_braid.engine.network.keys import KEY_FORMATS
from comfyui_braid.engine.network.layers import layer_shapes
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns
from comfyui_braid.engine.network.targets import DEFAULT_EXCLUDE, select_targets

_FLUX = {k: v for k, v in FLUX.items() if k != "image_model"}
_FLUX_2 = _FLUX | dict(
    in_channels=128,
    out_channels=128,
    axes_dim=[32] * 4,
    mlp_ratio=3.0,
    global_modulation=True,
    mlp_silu_act=True,
    qkv_bias=False,
    ops_bias=False,
    vec_in_dim=None,
    patch_size=1,
)
_CHROMA = {k: v for k, v in _FLUX.items() if k != "guidance_embed"} | dict(
    in_dim=64, out_dim=128, hidden_dim=128, n_layers=2
)
_HUNYUAN = {k: v for k, v in MODELS["hunyuan_video"].unet_config.items() if k != "image_model"}
_HUNYUAN_15 = _HUNYUAN | dict(
    depth_single_blocks=0,
    vec_in_dim=None,
    guidance_embed=False,
    byt5=True,
    use_cond_type_embedding=True,
    vision_in_dim=64,
    meanflow_sum=True,
)
_WAN = {k: v for k, v in MODELS["wan"].unet_config.items() if k != "image_model"}
del _WAN["window_size"]
_QWEN = {k: v for k, v in MODELS["qwen_image"].unet_config.items() if k != "image_model"}
_LUMINA = {k: v for k, v in MODELS["lumina2"].unet_config.items() if k != "image_model"}
_KANDINSKY = dict(num_text_blocks=2, num_visual_blocks=2, model_dim=128, ff_dim=256, time_dim=64)
_KREA = dict(
    layers=28, features=128, heads=2, kvheads=2, txtdim=64, txtheads=2, txtkvheads=2, tdim=64
)
_IDEOGRAM = dict(num_layers=2, num_attention_heads=2, intermediate_size=256, llm_features_dim=128)

# title → (class, small arguments, unet_config as detected, layers adapted by default)
REAL = {
    "FLUX.1": (Flux, _FLUX, {"image_model": "flux"}, 2 * 8 + 4 * 2),
    "FLUX.2": (Flux, _FLUX_2, {"image_model": "flux2", "hidden_size": 6144}, 2 * 8 + 4 * 2),
    "Wan 2.1 / 2.2": (WanModel, _WAN, {"image_model": "wan2.1"}, 3 * 10),
    "Qwen-Image": (QwenImageTransformer2DModel, _QWEN, {"image_model": "qwen_image"}, 2 * 12),
    "HunyuanVideo": (
        HunyuanVideo,
        _HUNYUAN,
        {"image_model": "hunyuan_video", "vec_in_dim": 768, "use_cond_type_embedding": False},
        2 * 8 + 2 * 2,
    ),
    "HunyuanVideo 1.5": (
        HunyuanVideo,
        _HUNYUAN_15,
        {"image_model": "hunyuan_video", "vec_in_dim": None, "use_cond_type_embedding": True},
        2 * 8,
    ),
    "Lumina 2": (NextDiT, _LUMINA, {"image_model": "lumina2", "dim": 2304}, 2 * 5),
    "Z-Image": (
        NextDiT,
        _LUMINA | {"z_image_modulation": True},
        {"image_model": "lumina2", "dim": 3840},
        2 * 5,
    ),
    "Kandinsky 5": (Kandinsky5, _KANDINSKY, {"image_model": "kandinsky5"}, 2 * 6 + 2 * 10),
    "Krea 2": (SingleStreamDiT, _KREA, {"image_model": "krea2"}, 264),
    "Ideogram 4": (Ideogram4Transformer2DModel, _IDEOGRAM, {"image_model": "ideogram4"}, 2 * 5),
}


def real_model(title: str) -> torch.nn.Module:
    """ComfyUI's own class without memory for its weights."""
    kind, arguments, _, _ = REAL[title]
    operations = comfy.ops.disable_weight_init
    return kind(**arguments, device="meta", dtype=torch.float32, operations=operations)


@pytest.mark.parametrize("title", REAL)
def test_each_architecture_adapts_the_layers_of_its_blocks(title):
    _, _, unet_config, adapted = REAL[title]
    architecture = architectures.architecture_of(unet_config)
    assert architecture.title == title
    report = select_targets(real_model(title), NetworkSpec(), architecture)
    assert len(report.selected) == adapted
    modulation = re.compile(r".*(_mod\.|modulation).*", re.IGNORECASE)
    assert not [c.name for c in report.selected if modulation.match(c.name)]


@pytest.mark.parametrize("title", REAL)
def test_every_default_exclude_matches_a_real_layer(title):
    architecture = architectures.architecture_of(REAL[title][2])
    report = select_targets(real_model(title), NetworkSpec(), architecture)
    defaults = [count for count in report.patterns if count.origin == DEFAULT_EXCLUDE]
    assert [count.pattern for count in defaults] == list(architecture.exclude)
    assert all(count.matches for count in defaults)


@pytest.mark.parametrize("title", REAL)
def test_every_rename_of_the_table_is_about_a_real_layer(title):
    architecture = architectures.architecture_of(REAL[title][2])
    names = layer_shapes(real_model(title))
    used = [*architecture.diffusers, *architecture.musubi]
    if title == "HunyuanVideo 1.5":  # shares HunyuanVideo's table and has no single blocks
        used = [rename for rename in used if "single" not in rename.layer]
    for rename in used:
        assert any(re.fullmatch(rename.layer, name) for name in names), rename


SUPPORTED = {
    "FLUX.1": "Flux",
    "FLUX.2": "Flux2",
    "Wan 2.1 / 2.2": "WAN21_T2V",
    "Qwen-Image": "QwenImage",
    "HunyuanVideo": "HunyuanVideo",
    "HunyuanVideo 1.5": "HunyuanVideo15",
    "Lumina 2": "Lumina2",
    "Z-Image": "ZImage",
    "Kandinsky 5": "Kandinsky5",
    "Krea 2": "Krea2",
    "Ideogram 4": "Ideogram4",
}


@pytest.mark.parametrize("key_format", KEY_FORMATS)
@pytest.mark.parametrize("title", REAL)
def test_core_s_key_map_gives_every_layer_its_own_delta(title, key_format):
    _, arguments, unet_config, _ = REAL[title]
    config = getattr(comfy.supported_models, SUPPORTED[title])(arguments | unet_config)
    config.unet_config.update(arguments)  # small again, where the family has fixed sizes
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="meta")
    architecture = architectures.architecture_of(unet_config)
    spec = NetworkSpec(rank=2, alpha=1.0, targets=TargetPatterns(include=(".*",)))
    report = select_targets(model.diffusion_model, spec, architecture)
    network = build_network(report.selected, spec, seed=0)
    for adapter in network.adapters.values():
        torch.nn.init.normal_(adapter.up)
    state = state_dict_of(network, architecture, key_format)
    loaded = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(model, {}))
    used = {key for patch in loaded.values() for key in patch.loaded_keys}
    assert used | {key for key in state if key.endswith(".alpha")} == set(state)
    for name, adapter in network.items():
        expected = adapter.delta_weight()
        key, found = f"diffusion_model.{name}.weight", torch.zeros_like(expected)
        for target, patch in loaded.items():
            whole, (_, start, length) = (
                target if isinstance(target, tuple) else (target, (0, 0, expected.shape[0]))
            )
            if whole == key:
                rows = found[start : start + length].clone()
                patch.calculate_weight(rows, key, 1.0, 1.0, None, lambda weight: weight)
                found[start : start + length] = rows
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_recognised_and_adapted(name):
    patcher = build(name)
    architecture = architecture_of(patcher)
    expected = {
        "flux": "FLUX.1",
        "flux_dev": "FLUX.1",
        "wan": "Wan 2.1 / 2.2",
        "qwen_image": "Qwen-Image",
        "hunyuan_video": "HunyuanVideo",
        "lumina2": "Lumina 2",
        "sd15": "U-Net (Stable Diffusion)",
    }
    assert architecture.title == expected[name]
    report = select_targets(diffusion_model_of(patcher), NetworkSpec(), architecture)
    assert all(count.matches for count in report.patterns)
    assert report.parameters > 0


def test_chroma_has_no_modulation_in_its_blocks():
    model = Chroma(
        **_CHROMA, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    report = select_targets(
        model, NetworkSpec(), architectures.architecture_of({"image_model": "chroma"})
    )
    assert len(report.selected) == 2 * 8 + 4 * 2


def test_the_unet_adapts_attention_and_takes_its_convolutions_with_conv_dim():
    patcher = build("sd15")
    model, architecture = diffusion_model_of(patcher), architecture_of(patcher)
    plain = select_targets(model, NetworkSpec(), architecture).selected
    assert not [c.name for c in plain if c.shape.has_large_kernel]
    assert [c.name for c in plain if c.name.endswith("attn1.to_q")]
    wide = select_targets(model, NetworkSpec(conv_rank=4), architecture).selected
    assert [c.name for c in wide if c.name.endswith("in_layers.2")]


def test_an_unknown_transformer_adapts_its_repeated_blocks():
    patcher = build("flux")
    report = select_targets(diffusion_model_of(patcher), NetworkSpec(), architectures.DEFAULT)
    flux = select_targets(diffusion_model_of(patcher), NetworkSpec(), architecture_of(patcher))
    assert [c.name for c in report.selected] == [c.name for c in flux.selected]


def test_a_transformer_without_a_row_of_its_own_leaves_its_modulation_alone():
    model = MMDiT(
        n_layers=3,
        n_double_layers=1,
        dim=256,
        n_heads=1,
        cond_seq_dim=16,
        device="meta",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    report = select_targets(model, NetworkSpec(), architectures.architecture_of({"dim": 256}))
    assert report.architecture is architectures.DEFAULT
    assert len(report.selected) == 8 + 2 * 3 + 2 * (4 + 3)
    assert {c.name for c in report.candidates if ".mod" in c.name}.isdisjoint(
        c.name for c in report.selected
    )


def test_whitelist_reaches_layers_outside_the_blocks():
    patcher = build("flux")
    spec = NetworkSpec(
        targets=TargetPatterns(include=(r"img_in|.*img_attn\.qkv",), mode="whitelist")
    )
    report = select_targets(diffusion_model_of(patcher), spec, architecture_of(patcher))
    assert [c.name for c in report.selected] == [
        "img_in",
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.img_attn.qkv",
    ]
