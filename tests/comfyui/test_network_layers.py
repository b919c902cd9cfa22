"""The table of architectures, held to ComfyUI's real models."""

import re

import comfy.lora
import comfy.ops
import comfy.utils
import pytest
import torch
from comfy.ldm.aura.mmdit import MMDiT
from real_models import REAL, network_of, real_model, with_base_model
from tiny_models import MODELS, build

from comfyui_braid.engine.comfyui.model import architecture_of, diffusion_model_of
from comfyui_braid.engine.network import architectures
from comfyui_braid.engine.network.adapter_file import state_dict_of
from comfyui_braid.engine.network.keys import KEY_FORMATS
from comfyui_braid.engine.network.layers import layer_shapes
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns
from comfyui_braid.engine.network.targets import DEFAULT_EXCLUDE, select_targets

UNET = "U-Net (Stable Diffusion)"
CANNOT = ("HunyuanVideo 1.5", "HunyuanImage 2.1", "Lumina 2")  # be read by diffusers


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


@pytest.mark.parametrize("title", [title for title in REAL if title != UNET])
def test_every_rename_of_the_table_is_about_a_real_layer(title):
    architecture = architectures.architecture_of(REAL[title][2])
    names = layer_shapes(real_model(title))
    used = [*architecture.diffusers, *architecture.musubi]
    if title == "HunyuanVideo 1.5":  # shares HunyuanVideo's table and has no single blocks
        used = [rename for rename in used if "single" not in rename.layer]
    for rename in used:
        assert any(re.fullmatch(rename.layer, name) for name in names), rename


UNETS = {
    "SD 1.5": ((1, 2, 4, 4), [1] * 6 + [0] * 2, [1] * 9 + [0] * 3),
    "SDXL": ((1, 2, 4), [0, 0, 2, 2, 4, 4], [0] * 3 + [2] * 3 + [4] * 3),
    "SDXL refiner": ((1, 2, 4, 4), [0, 0, 4, 4, 4, 4, 0, 0], [0] * 3 + [4] * 6 + [0] * 3),
}


@pytest.mark.parametrize("shape", UNETS)
def test_every_layer_of_a_unet_has_the_name_that_core_says_diffusers_gives_it(shape):
    multiples, downward, upward = UNETS[shape]
    kind, arguments, unet_config, _ = REAL[UNET]
    arguments = arguments | dict(
        channel_mult=multiples,
        num_res_blocks=[2] * len(multiples),
        transformer_depth=downward,
        transformer_depth_output=upward,
    )
    operations = comfy.ops.disable_weight_init
    model = kind(**arguments, device="meta", dtype=torch.float32, operations=operations)
    theirs = {ours: name for name, ours in comfy.utils.unet_to_diffusers(arguments).items()}
    row = architectures.architecture_of(unet_config)
    for name in layer_shapes(model):
        (found,) = next(others for rename in row.diffusers if (others := rename.of(name)))
        found = found.replace(".processor.to_out", ".to_out.0").replace(".processor.", ".")
        assert f"{found}.weight" == theirs[f"{name}.weight"]


# title → layers that hold q, k and v (and mlp) in one weight, among those of the blocks
FUSED = {
    "FLUX.1": 2 * 2 + 4,
    "FLUX.2": 2 * 2 + 4,
    "Chroma": 2 * 2 + 4,
    "HunyuanVideo": 2 * 2 + 2,
    "HunyuanVideo 1.5": 2 * 2,
    "HunyuanImage 2.1": 2 * 2 + 2,
    "Lumina 2": 2,
    "Z-Image": 2,
    "Ideogram 4": 2,
}
FORMATS = [
    (title, key_format, split_qkv)
    for split_qkv in (False, True)
    for title in (FUSED if split_qkv else REAL)
    for key_format in KEY_FORMATS
    if not (title in CANNOT and key_format == "diffusers")
]


@pytest.mark.parametrize("title", REAL)
def test_split_qkv_parts_every_layer_that_holds_q_k_and_v_and_no_other(title):
    architecture = architectures.architecture_of(REAL[title][2])
    report = select_targets(real_model(title), NetworkSpec(split_qkv=True), architecture)
    parted = [c for c in report.selected if c.rows]
    assert len(parted) == FUSED.get(title, 0)
    assert not [c for c in report.selected if re.search(r"qkv|linear1", c.name) and not c.rows]
    assert all(sum(c.rows) == c.shape.out_features for c in parted)
    assert bool(report.warnings) == (title not in FUSED)


@pytest.mark.parametrize("title, key_format, split_qkv", FORMATS)
def test_core_s_key_map_gives_every_layer_its_own_delta(title, key_format, split_qkv):
    model = with_base_model(title)
    architecture = architectures.architecture_of(REAL[title][2])
    every = TargetPatterns(include=(".*",))
    network = network_of(model.diffusion_model, architecture, every, split_qkv=split_qkv)
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


@pytest.mark.parametrize("title", CANNOT)
def test_an_architecture_that_diffusers_cannot_read_is_refused_and_says_why(title):
    architecture = architectures.architecture_of(REAL[title][2])
    network = network_of(real_model(title), architecture, TargetPatterns())
    sentence = re.escape(f"{title}: {architecture.diffusers_cannot}; choose comfyui or kohya")
    with pytest.raises(ValueError, match=f"key_format diffusers: {sentence}"):
        state_dict_of(network, architecture, "diffusers")


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
