"""Adapter files: musubi's own in and out, dialects, metadata, hashes."""

import hashlib
import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from torch import nn

from comfyui_braid.engine.files import read_header
from comfyui_braid.engine.hashes import sshs_hashes
from comfyui_braid.engine.network.architectures import (
    ARCHITECTURES,
    DEFAULT,
    architecture_named,
    architecture_of,
)
from comfyui_braid.engine.network.attach import build_network
from comfyui_braid.engine.network.checkpoint import (
    cast,
    load_weights,
    network_from,
    read_adapter,
    state_dict_of,
    verify_adapter,
    weights_of,
    write_adapter,
)
from comfyui_braid.engine.network.keys import converted, decoded, encoded, format_of
from comfyui_braid.engine.network.layers import LayerShape, layer_shapes
from comfyui_braid.engine.network.metadata import adapter_metadata, parse_metadata
from comfyui_braid.engine.network.spec import KINDS, NetworkSpec, TargetPatterns
from comfyui_braid.engine.network.targets import select_targets
from comfyui_braid.engine.network.weights import AdapterWeights

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "network_lora.json").read_text())
FLUX = architecture_of({"image_model": "flux"})
HUNYUAN = architecture_of({"image_model": "hunyuan_video", "vec_in_dim": 768})
HUNYUAN_15 = architecture_of({"image_model": "hunyuan_video", "use_cond_type_embedding": True})
Z_IMAGE = architecture_of({"image_model": "lumina2", "dim": 3840})


def golden_state():
    """The tensors of the file that musubi saved."""
    return {
        key: torch.tensor(entry["values"]).view(entry["shape"]).float()
        for key, entry in GOLDEN["state_dict"].items()
    }


def tiny_layers():
    """The adapted layers of musubi's tiny model."""
    sizes = {"img_attn_qkv": (4, 6), "img_mlp.0": (4, 8), "img_mlp.2": (8, 4)}
    return {
        f"double_blocks.{block}.{name}": LayerShape(in_features=i, out_features=o)
        for block in range(2)
        for name, (i, o) in sizes.items()
    }


def linear(rows, columns):
    return LayerShape(in_features=columns, out_features=rows)


def factors(rows, columns, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, columns, generator=generator),
        torch.randn(rows, rank, generator=generator),
    )


def delta(weights: AdapterWeights, shape: LayerShape, name="layer"):
    """ΔW of one layer's weights."""
    network = network_from({name: weights}, {name: shape}, NetworkSpec())
    return network.adapters["lora_unet_" + name].delta_weight()


def test_kohya_files_have_musubi_s_keys_order_shapes_and_dtypes():
    weights = decoded(golden_state(), tiny_layers(), HUNYUAN)
    state = encoded(weights, "kohya", HUNYUAN)
    assert list(state) == list(GOLDEN["state_dict"])
    for key, entry in GOLDEN["state_dict"].items():
        assert list(state[key].shape) == entry["shape"]
        assert str(state[key].dtype) == entry["dtype"]
        assert state[key].flatten().tolist() == entry["values"]


@pytest.mark.parametrize("case", GOLDEN["hash_lora_file"], ids=lambda case: case["dtype"])
def test_a_kohya_file_is_as_long_as_musubi_s_and_its_hash_is_that_of_its_bytes(case, tmp_path):
    """The weights behind the golden's hash are not recorded; its file's size and hash rule are."""
    precision = {"None": "keep", "torch.float32": "fp32", "torch.bfloat16": "bf16"}.get(
        case["dtype"], "fp16"
    )
    path = tmp_path / "lora.safetensors"
    write_adapter(path, cast(golden_state(), "kohya", precision), case["metadata_in"])
    header = read_header(path)
    after_header = path.read_bytes()[header.data_start :]
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(after_header).hexdigest()
    assert header.metadata["sshs_legacy_hash"] == case["sshs_legacy_hash"]
    assert path.stat().st_size == case["file_size"]


class Model(nn.Module):
    """Linear and convolutions in two blocks, under names that FLUX has."""

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "img_attn": nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)}),
                    "img_mlp": nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)),
                }
            )
            for _ in range(2)
        )
        self.single_blocks = nn.ModuleList([nn.ModuleDict({"linear1": nn.Linear(8, 56)})])


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1))])


def network_for(model, architecture, **spec):
    spec = NetworkSpec(**{"rank": 2, "alpha": 3.0} | spec)
    network = build_network(select_targets(model, spec, architecture).selected, spec, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key_format", ["comfyui", "kohya"])
@pytest.mark.parametrize("model, architecture", [(Model, FLUX), (Convolutional, DEFAULT)])
def test_every_kind_survives_its_file_bit_for_bit(model, architecture, key_format, kind, tmp_path):
    model = model()
    network = network_for(model, architecture, kind=kind, conv_rank=2, conv_alpha=1.0)
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, state_dict_of(network, architecture, key_format), {})
    weights = read_adapter(path, layer_shapes(model), architecture)
    again = network_for(model, architecture, kind=kind, conv_rank=2, conv_alpha=1.0)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    load_weights(again, weights)
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    rebuilt = network_from(weights, layer_shapes(model), network.spec)
    for (_, one), (_, other) in zip(network.items(), rebuilt.items(), strict=True):
        assert torch.equal(one.delta_weight(), other.delta_weight())


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


def test_weights_of_another_shape_are_refused():
    part = "transformer.layers.0.attention.to_k"
    state = {f"{part}.lora_A.weight": torch.zeros(2, 8), f"{part}.lora_B.weight": torch.zeros(6, 2)}
    with pytest.raises(ValueError, match="part 2 of .* has 6 rows in the file and 8 in the model"):
        decoded(state, {"layers.0.attention.qkv": linear(24, 8)}, Z_IMAGE)
    network = network_for(Model(), FLUX)
    other = weights_of(network_for(Model(), FLUX, rank=3))
    with pytest.raises(ValueError, match=r"needs down \(2, 8\), up \(24, 2\), the file has down"):
        load_weights(network, other)
    with pytest.raises(ValueError, match="the file has nothing"):
        load_weights(network, {})
    wrong = {
        "layer": AdapterWeights(
            kind="lora", tensors={"down": torch.zeros(2, 7), "up": torch.zeros(8, 2)}, alpha=1.0
        )
    }
    with pytest.raises(ValueError, match="does not fit Linear 8 → 8"):
        network_from(wrong, {"layer": linear(8, 8)}, NetworkSpec())


def test_alpha_may_be_an_integer_or_absent():
    down, up = factors(8, 8, 4)
    state = {"lora_unet_layer.lora_down.weight": down, "lora_unet_layer.lora_up.weight": up}
    layers = {"layer": linear(8, 8)}
    assert decoded(state, layers, DEFAULT)["layer"].alpha == 4.0
    state["lora_unet_layer.alpha"] = torch.tensor(2, dtype=torch.int64)
    assert decoded(state, layers, DEFAULT)["layer"].alpha == 2.0


def test_a_state_dict_holds_copies_so_that_training_may_go_on():
    network = network_for(Model(), FLUX)
    state = state_dict_of(network, FLUX)
    before = {key: tensor.clone() for key, tensor in state.items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[key], before[key]) for key in state)


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


def test_a_file_that_reads_back_different_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(
        path, {"x": torch.tensor([1.0, float("nan")])}, {"ss_a": "1"}
    )  # NaN is a bit pattern
    tensors = {"x": torch.tensor([1.0, 2.0])}
    with pytest.raises(OSError, match="x read back different"):
        verify_adapter(
            path, tensors, {"ss_a": "1"} | sshs_hashes({"x": torch.tensor([1.0, float("nan")])}, {})
        )
    with pytest.raises(OSError, match="other keys or metadata"):
        verify_adapter(path, tensors, {})


def test_metadata_is_all_strings_and_has_musubi_s_fields():
    spec = NetworkSpec(
        rank=8,
        alpha=0.0,
        neuron_dropout=0.1,
        loraplus_lr_ratio=4.0,
        targets=TargetPatterns(exclude=(".*a.*",)),
    )
    metadata = adapter_metadata(
        spec,
        HUNYUAN,
        title="T",
        created=datetime(2026, 1, 2, 3, 4, 5, 6),
        training={"seed": 3, "lr_warmup_steps": None, "datasets": [{"n": 1}], "min_timestep": 200},
        timestep_range=(200, 900),
    )
    assert metadata == {
        "ss_seed": "3",
        "ss_lr_warmup_steps": "None",
        "ss_datasets": '[{"n": 1}]',
        "ss_min_timestep": "200",
        "ss_base_model_version": "hunyuan_video",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "8.0",
        "ss_network_dropout": "0.1",
        "ss_network_args": '{"exclude_patterns": "[\'.*a.*\']", "loraplus_lr_ratio": "4.0"}',
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "hunyuan-video/lora",
        "modelspec.implementation": "https://github.com/Tencent/HunyuanVideo",
        "modelspec.title": "T",
        "modelspec.resolution": "1280x720",
        "modelspec.date": "2026-01-02T03:04:05",
        "modelspec.timestep_range": "200,900",
    }


@pytest.mark.parametrize(
    "golden, unet_config",
    [
        ("hv", {"image_model": "hunyuan_video", "vec_in_dim": 768}),
        ("wan", {"image_model": "wan2.1"}),
        ("fk", {"image_model": "flux"}),
        ("f2d", {"image_model": "flux2", "hidden_size": 6144}),
        ("f2k4b", {"image_model": "flux2", "hidden_size": 3072}),
        ("f2k9b", {"image_model": "flux2", "hidden_size": 4096}),
        ("qi", {"image_model": "qwen_image"}),
        ("qil", {"image_model": "qwen_image", "use_additional_t_cond": True}),
        ("k5", {"image_model": "kandinsky5"}),
        ("hv15", {"image_model": "hunyuan_video", "use_cond_type_embedding": True}),
        ("zi", {"image_model": "lumina2", "dim": 3840}),
        ("i4", {"image_model": "ideogram4"}),
        ("kr2", {"image_model": "krea2"}),
    ],
)
def test_modelspec_is_musubi_s(golden, unet_config):
    """Resolution only where musubi's is not its placeholder for video and image alike."""
    metadata = adapter_metadata(
        NetworkSpec(), architecture_of(unet_config), title="T", created=datetime(2026, 1, 1)
    )
    expected = GOLDEN["modelspec"][golden]
    for key in ("sai_model_spec", "architecture", "implementation", "title"):
        assert metadata[f"modelspec.{key}"] == expected[f"modelspec.{key}"]
    if expected["modelspec.resolution"] != "1280x720":
        assert metadata["modelspec.resolution"] == expected["modelspec.resolution"]


def test_every_architecture_is_found_by_the_version_that_it_writes():
    versions = [architecture.base_model_version for architecture in ARCHITECTURES]
    assert len(set(versions)) == len(versions)
    assert all(architecture_named(a.base_model_version) is a for a in ARCHITECTURES)
    assert architecture_named("nothing") is None


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("", {}),
        (
            ' {"a": "b", "c": 1, "d": null, "e": [1]} ',
            {"a": "b", "c": "1", "d": "None", "e": "[1]"},
        ),
    ],
)
def test_metadata_is_read_from_json(text, parsed):
    assert parse_metadata(text) == parsed


def test_broken_metadata_says_where():
    with pytest.raises(ValueError, match="line 2, column"):
        parse_metadata('{"a": 1,\n b}')
    with pytest.raises(ValueError, match="not a JSON object"):
        parse_metadata('"text"')
    with pytest.raises(ValueError, match="sshs_legacy_hash is computed from the tensors"):
        parse_metadata('{"sshs_legacy_hash": "0"}')
    with pytest.raises(ValueError, match="'a.ud800' holds half of a character"):
        parse_metadata('{"a\\ud800": 1}')
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 100_000 + "}"):
        with pytest.raises(ValueError, match="metadata: not JSON"):
            parse_metadata(text)
