"""Adapter files of other programs and formats: names, split layers, and what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from network_files import FLUX, Z_IMAGE, Model, delta, factors, linear, network_for

from comfyui_braid.engine.network.adapter_file import state_dict_of
from comfyui_braid.engine.network.architectures import DEFAULT, architecture_of
from comfyui_braid.engine.network.keys import converted, decoded, format_of
from comfyui_braid.engine.network.layers import layer_shapes

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "network_lora.json").read_text())
HUNYUAN = architecture_of({"image_model": "hunyuan_video", "vec_in_dim": 768})
HUNYUAN_15 = architecture_of({"image_model": "hunyuan_video", "use_cond_type_embedding": True})


def test_flux_in_diffusers_format_is_split_as_diffusers_has_it_and_joined_again():
    network = network_for(Model(), FLUX)
    state = state_dict_of(network, FLUX, "diffusers")
    assert {key for key in state if "single" in key and "lora_B" in key} == {
        f"transformer.single_transformer_blocks.0.{part}.lora_B.weight"
        for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    }
    block = "transformer.transformer_blocks.1."
    assert state[block + "attn.to_k.lora_B.weight"].shape == (8, 2)
    assert state[block + "ff.net.0.proj.lora_A.weight"].shape == (2, 8)
    assert not [key for key in state if key.endswith("alpha")]
    weights = decoded(state, layer_shapes(Model()), FLUX)
    for name, adapter in network.items():
        assert weights[name].rank == 2  # the parts share their down matrix
        found = delta(weights[name], adapter.shape)
        torch.testing.assert_close(found, adapter.delta_weight(), rtol=1e-5, atol=1e-6)


def test_separate_q_k_v_of_another_trainer_become_one_layer_of_the_sum_of_their_ranks():
    """As musubi's Z-Image converter: down stacked, up block-diagonal, rank and alpha three-fold."""
    shape = linear(24, 8)
    parts = {part: factors(8, 8, 2, seed) for seed, part in enumerate("qkv")}
    state = {}
    for part, (down, up) in parts.items():
        stem = f"lora_unet_layers_3_attention_to_{part}"
        state |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(1, dtype=torch.int64),
        }
    weights = decoded(state, {"layers.3.attention.qkv": shape}, Z_IMAGE)["layers.3.attention.qkv"]
    assert (weights.rank, weights.alpha) == (6, 3.0)
    expected = torch.cat([0.5 * up @ down for down, up in parts.values()])
    torch.testing.assert_close(delta(weights, shape), expected)
    # only k, and of another scale than q: the rows of v stay zero
    del state["lora_unet_layers_3_attention_to_v.lora_down.weight"]
    del state["lora_unet_layers_3_attention_to_v.lora_up.weight"]
    del state["lora_unet_layers_3_attention_to_v.alpha"]
    state["lora_unet_layers_3_attention_to_k.alpha"] = torch.tensor(4.0)
    weights = decoded(state, {"layers.3.attention.qkv": shape}, Z_IMAGE)["layers.3.attention.qkv"]
    expected = torch.cat(
        [0.5 * parts["q"][1] @ parts["q"][0], 2 * parts["k"][1] @ parts["k"][0], torch.zeros(8, 8)]
    )
    torch.testing.assert_close(delta(weights, shape), expected)


def test_grouped_query_attention_is_split_by_its_own_sizes():
    shape = linear(8 + 4 + 4, 8)
    down, up = factors(4, 8, 2)
    state = {
        "transformer.layers.0.attention.to_v.lora_A.weight": down,
        "transformer.layers.0.attention.to_v.lora_B.weight": up,
    }
    weights = decoded(state, {"layers.0.attention.qkv": shape}, Z_IMAGE)["layers.0.attention.qkv"]
    expected = torch.cat([torch.zeros(12, 8), up @ down])
    torch.testing.assert_close(delta(weights, shape), expected)


@pytest.mark.parametrize(
    "architecture, layer, keys",
    [
        (HUNYUAN, "double_blocks.0.img_mlp.0", ["lora_unet_double_blocks_0_img_mlp_fc1"]),
        (HUNYUAN, "double_blocks.0.img_mod.lin", ["lora_unet_double_blocks_0_img_mod_linear"]),
        (
            HUNYUAN,
            "single_blocks.3.modulation.lin",
            ["diffusion_model.single_blocks.3.modulation.linear"],
        ),
        (
            HUNYUAN_15,
            "double_blocks.0.img_attn.qkv",
            [f"lora_unet_double_blocks_0_img_attn_{part}" for part in "qkv"],
        ),
        # what musubi's convert_lora makes of FLUX and of Z-Image, wrongly
        (FLUX, "double_blocks.0.img_attn.qkv", ["diffusion_model.double_blocks.0.img_attn_qkv"]),
        (Z_IMAGE, "layers.0.adaLN_modulation.0", ["diffusion_model.layers.0.adaLN.modulation.0"]),
        (
            Z_IMAGE,
            "noise_refiner.0.attention.out",
            ["transformer.noise.refiner.0.attention.to.out.0"],
        ),
        (FLUX, "double_blocks.0.img_mod.lin", ["transformer.transformer_blocks.0.norm1.linear"]),
        (FLUX, "single_blocks.0.linear2", ["lycoris_single_transformer_blocks_0_proj_out"]),
        (FLUX, "single_blocks.0.linear2", ["base_model.model.single_blocks.0.linear2"]),
    ],
)
def test_names_of_other_programs_are_known(architecture, layer, keys):
    shape = linear(24, 8)
    state = {}
    for key in keys:
        down, up = factors(24 // len(keys), 8, 2)
        state |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    assert list(decoded(state, {layer: shape}, architecture)) == [layer]


def test_every_name_that_musubi_s_converter_writes_is_read():
    models = {
        "wan": {"image_model": "wan2.1"},
        "hunyuan": {"image_model": "hunyuan_video", "vec_in_dim": 768},
        "flux": {"image_model": "flux"},
        "flux2": {"image_model": "flux2"},
        "qwen": {"image_model": "qwen_image"},
        "krea2": {"image_model": "krea2"},
    }
    ours = {
        "hunyuan": ["double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"]
        + ["double_blocks.0.txt_attn.proj", "single_blocks.3.linear1"]
        + ["single_blocks.3.modulation.lin"],
        "flux": ["double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"]
        + [
            "double_blocks.0.txt_attn.proj",
            "single_blocks.3.linear1",
            "double_blocks.1.img_mod.lin",
        ],
        "flux2": ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"],
        "wan": ["blocks.0.self_attn.q", "blocks.0.cross_attn.k_img", "blocks.0.ffn.0"],
        "qwen": ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"]
        + ["transformer_blocks.12.img_mlp.net.0.proj", "transformer_blocks.0.img_mod.1"]
        + ["transformer_blocks.0.attn.add_q_proj"],
        "krea2": ["blocks.0.attn.wq", "blocks.0.mlp.gate", "last.linear"],
    }
    for name, unet_config in models.items():
        keys = GOLDEN["convert"]["to_other"][name]["out_keys"]
        layers = {layer: linear(8, 8) for layer in ours[name]}
        state = {key: torch.zeros((2, 8) if "lora_A" in key else (8, 2)) for key in keys}
        assert list(decoded(state, layers, architecture_of(unet_config))) == ours[name], name


@pytest.mark.parametrize(
    "state, sentence",
    [
        ({"lora_unet_other.lora_down.weight": 0}, "1 of 1 tensors belong to no layer"),
        ({"lora_unet_layer.dora_scale": 0}, "of a kind that Braid does not read"),
        ({"lora_unet_layer.lora_down.weight": 0}, "holds only down of the lora of layer"),
        ({"lora_unet_layer.alpha": 0}, "holds only an alpha for layer"),
        (
            {"lora_unet_layer.lora_down.weight": 0, "lora_unet_layer.lokr_w1": 0},
            "holds lokr, lora for layer",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_reason(state, sentence):
    tensors = {key: torch.zeros(2, 8) for key in state}
    with pytest.raises(ValueError, match=sentence):
        decoded(tensors, {"layer": linear(8, 8)}, DEFAULT)


def test_alpha_may_be_an_integer_or_absent():
    down, up = factors(8, 8, 4)
    state = {"lora_unet_layer.lora_down.weight": down, "lora_unet_layer.lora_up.weight": up}
    layers = {"layer": linear(8, 8)}
    assert decoded(state, layers, DEFAULT)["layer"].alpha == 4.0
    state["lora_unet_layer.alpha"] = torch.tensor(2, dtype=torch.int64)
    assert decoded(state, layers, DEFAULT)["layer"].alpha == 2.0


@pytest.mark.parametrize("given", ["comfyui", "kohya", "diffusers"])
@pytest.mark.parametrize("wanted", ["comfyui", "kohya", "diffusers"])
def test_any_format_converts_to_any_other_with_the_same_effect(given, wanted):
    network, layers = network_for(Model(), FLUX), layer_shapes(Model())
    state = converted(state_dict_of(network, FLUX, given), wanted, FLUX, layers)
    assert format_of(state) == wanted
    weights = decoded(state, layers, FLUX)
    for name, adapter in network.items():
        found = delta(weights[name], adapter.shape)
        torch.testing.assert_close(found, adapter.delta_weight(), rtol=1e-5, atol=1e-6)


def test_conversions_that_need_the_model_say_so():
    state = state_dict_of(network_for(Model(), FLUX), FLUX, "kohya")
    with pytest.raises(ValueError, match="key_format comfyui: .*connect the model"):
        converted(state, "comfyui", FLUX)
    with pytest.raises(ValueError, match="diffusers loads LoRA only"):
        state_dict_of(network_for(Model(), FLUX, kind="loha"), FLUX, "diffusers")
