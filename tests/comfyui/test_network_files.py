"""Adapter files that Braid writes, read by ComfyUI's own loader and by Braid."""

import json
import logging
import re

import comfy.lora
import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import safetensors
import torch
from network_files import adapter_of
from tiny_models import ARCHITECTURES, MODELS, TinyModel, build, built, sampled

from comfyui_braid.engine.checkpoints import AdapterStateDict
from comfyui_braid.engine.comfyui.model import architecture_of, diffusion_model_of
from comfyui_braid.engine.network.adapter_file import (
    read_adapter,
    state_dict_of,
    weights_of,
    write_adapter,
)
from comfyui_braid.engine.network.adapters import SplitLoRA
from comfyui_braid.engine.network.architectures import DEFAULT
from comfyui_braid.engine.network.attach import attached, build_network
from comfyui_braid.engine.network.keys import KEY_FORMATS
from comfyui_braid.engine.network.layers import layer_shapes
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns
from comfyui_braid.engine.network.targets import select_targets

EVERY_LAYER = TargetPatterns(include=(".*",), mode="whitelist")
OF_THE_BLOCKS = TargetPatterns(include=(".*",))  # takes the modulation layers back in, too
FUSED = ("flux", "hunyuan_video", "lumina2")
FORMATS = [
    (name, key_format, split_qkv)
    for split_qkv in (False, True)
    for name in (FUSED if split_qkv else ARCHITECTURES)
    for key_format in KEY_FORMATS
    if (name, key_format) != ("lumina2", "diffusers")  # refused
]


def trained(patcher, targets=OF_THE_BLOCKS, **spec):
    """A network whose delta is as large as a real one's, without training it."""
    spec = NetworkSpec(rank=3, alpha=2.0, targets=targets, **spec)
    report = select_targets(diffusion_model_of(patcher), spec, architecture_of(patcher))
    network = build_network(report.selected, spec, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            size = 0.1 if network.spec.kind == "lora" else 0.4  # products of more factors
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return network


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def loaded_by_core(patcher, path, caplog):
    """The model with the file applied by ComfyUI; fails on any key that is not matched."""
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    with caplog.at_level(logging.WARNING):
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0.0)
    assert not [r for r in caplog.messages if "not loaded" in r.lower()], caplog.messages
    return patched


@pytest.mark.parametrize("name, key_format, split_qkv", FORMATS)
def test_core_loads_every_key_with_the_effect_of_the_attached_network(
    name, key_format, split_qkv, tmp_path, caplog
):
    patcher = build(name)
    network = trained(patcher, split_qkv=split_qkv)
    assert any(isinstance(a, SplitLoRA) for a in network.in_order()) == split_qkv
    path = tmp_path / "lora.safetensors"
    write_adapter(path, state_dict_of(network, architecture_of(patcher), key_format), {})
    before = sampled(patcher, name)
    with attached(diffusion_model_of(patcher), network):
        expected = sampled(patcher, name)
    assert distance(expected, before) > 0.01
    assert distance(sampled(loaded_by_core(patcher, path, caplog), name), expected) < 1e-4
    assert torch.equal(sampled(patcher, name), before)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("key_format", ["comfyui", "kohya"])
@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_core_loads_loha_and_lokr(name, key_format, kind, tmp_path, caplog):
    patcher = build(name)
    network = trained(patcher, kind=kind, conv_rank=2, conv_alpha=1.0)
    path = tmp_path / "lora.safetensors"
    write_adapter(path, state_dict_of(network, architecture_of(patcher), key_format), {})
    before = sampled(patcher, name)
    with attached(diffusion_model_of(patcher), network):
        expected = sampled(patcher, name)
    assert distance(expected, before) > 0.01
    assert distance(sampled(loaded_by_core(patcher, path, caplog), name), expected) < 1e-4


def unet_of_two_blocks_a_level():
    """A tiny U-Net of Stable Diffusion's real depth: two residual blocks a level, not one."""
    two = dict(num_res_blocks=[2, 2], transformer_depth=[1] * 4, transformer_depth_output=[1] * 6)
    return built(TinyModel("SD15", MODELS["sd15"].unet_config | two, (4, 16, 16), 64))


@pytest.mark.parametrize("key_format", KEY_FORMATS)
def test_core_loads_the_convolutions_of_a_unet(key_format, tmp_path, caplog):
    patcher = unet_of_two_blocks_a_level()
    network = trained(patcher, conv_rank=2, conv_alpha=1.0)
    path = tmp_path / "lora.safetensors"
    write_adapter(path, state_dict_of(network, architecture_of(patcher), key_format), {})
    with attached(diffusion_model_of(patcher), network):
        expected = sampled(patcher, "sd15")
    assert distance(sampled(loaded_by_core(patcher, path, caplog), "sd15"), expected) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_core_loads_layers_outside_the_blocks_in_comfyui_format(name, tmp_path, caplog):
    patcher = build(name)
    network = trained(patcher, targets=EVERY_LAYER, conv_rank=2)
    path = tmp_path / "lora.safetensors"
    write_adapter(path, state_dict_of(network, architecture_of(patcher), "comfyui"), {})
    with attached(diffusion_model_of(patcher), network):
        expected = sampled(patcher, name)
    assert distance(sampled(loaded_by_core(patcher, path, caplog), name), expected) < 1e-3


@pytest.mark.parametrize("name, key_format, split_qkv", FORMATS)
def test_braid_reads_its_own_files_back(name, key_format, split_qkv):
    patcher = build(name)
    network, architecture = trained(patcher, split_qkv=split_qkv), architecture_of(patcher)
    layers = layer_shapes(diffusion_model_of(patcher))
    state = state_dict_of(network, architecture, key_format)
    weights = read_adapter(state, layers, architecture)
    assert list(weights) == list(network.layer_names)
    before = weights_of(network)
    for name, ours in network.items():
        read = adapter_of(weights[name], ours.shape)
        torch.testing.assert_close(read.delta_weight(), ours.delta_weight(), rtol=1e-5, atol=1e-7)
        assert read.rank == before[name].rank
    if key_format != "diffusers":
        assert all(
            torch.equal(before[name].tensors[key], tensor)
            for name, layer in weights.items()
            for key, tensor in layer.tensors.items()
        )


@pytest.mark.parametrize("convention", ["processors", "PEFT", "sd-scripts"])
def test_the_files_of_a_unet_are_read_back_under_each_of_diffusers_names(convention):
    patcher = unet_of_two_blocks_a_level()
    network, architecture = trained(patcher, conv_rank=2), architecture_of(patcher)
    state = state_dict_of(network, architecture, "diffusers")
    assert (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight"
        in state
    )
    if convention != "processors":
        state = {peft_name(key): tensor for key, tensor in state.items()}
    if convention == "sd-scripts":
        state = {sd_scripts_name(key): tensor for key, tensor in state.items()}
    weights = read_adapter(state, layer_shapes(diffusion_model_of(patcher)), architecture)
    assert list(weights) == list(network.layer_names)
    for name, ours in network.items():
        read = adapter_of(weights[name], ours.shape)
        torch.testing.assert_close(read.delta_weight(), ours.delta_weight(), rtol=1e-5, atol=1e-7)


def peft_name(key):
    key = key.replace(".processor.to_out_", ".to_out.0_").replace(".processor.", ".")
    return re.sub(r"[._]lora\.(down|up)", lambda m: f".lora_{'AB'[m[1] == 'up']}", key)


def sd_scripts_name(key):
    stem, matrix = re.fullmatch(r"unet\.(.*)\.lora_([AB])\.weight", key).groups()
    side = "down" if matrix == "A" else "up"
    return f"lora_unet_{stem.replace('.', '_')}.lora_{side}.weight"


@pytest.mark.parametrize("name", ["lumina2", "sd15"])
def test_files_of_diffusers_format_from_before_it_was_refused_are_still_read(name):
    patcher = build(name)
    network, architecture = trained(patcher), architecture_of(patcher)
    state = state_dict_of(network, DEFAULT, "diffusers")
    assert all(key.startswith("diffusion_model.") and ".lora_" in key for key in state)
    weights = read_adapter(state, layer_shapes(diffusion_model_of(patcher)), architecture)
    assert list(weights) == list(network.layer_names)


def test_the_loras_of_core_s_own_trainer_can_be_saved_in_every_format(tmp_path):
    patcher = build("flux")
    weights = trained(patcher)
    lora = state_dict_of(weights, architecture_of(patcher))
    # core's trainer adapts norms and biases as well
    lora["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"] = torch.zeros(384)
    path = saved(lora, tmp_path, key_format="kohya")
    tensors = comfy.utils.load_torch_file(path, safe_load=True)
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    assert comfy.lora.load_lora(tensors, key_map)
    assert len(tensors) == len(lora)
    with pytest.raises(ValueError, match="diff_b.*not a LoRA"):
        saved(lora, tmp_path, key_format="diffusers", metadata='{"ss_base_model_version": "flux1"}')


def saved(lora, tmp_path, **inputs):
    """Runs BraidSaveLora with `tmp_path` as ComfyUI's output folder; the path that it answers."""
    import folder_paths

    from comfyui_braid.nodes.network import BraidSaveLora

    inputs = {
        "filename_prefix": "loras/test",
        "key_format": "comfyui",
        "save_precision": "keep",
    } | inputs
    previous = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    try:
        with torch.inference_mode():
            return BraidSaveLora.execute(lora=lora, **inputs).args[0]
    finally:
        folder_paths.set_output_directory(previous)


def test_save_writes_recorded_and_given_metadata_with_hashes(tmp_path):
    patcher = build("flux")
    state = state_dict_of(trained(patcher), architecture_of(patcher))
    lora = AdapterStateDict(state, {"ss_seed": "1", "modelspec.author": "run"})
    path = saved(lora, tmp_path, metadata=json.dumps({"modelspec.author": "me", "ss_tags": ["a"]}))
    assert path == str(tmp_path / "loras" / "test_00001_.safetensors")
    assert saved(lora, tmp_path).endswith("test_00002_.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_seed"] == "1"
    assert metadata["modelspec.author"] == "me"
    assert metadata["ss_tags"] == '["a"]'
    assert len(metadata["sshs_model_hash"]) == 64 and len(metadata["sshs_legacy_hash"]) == 8


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_save_precision_halves_the_matrices_and_keeps_alpha_exact(precision, dtype, tmp_path):
    patcher = build("flux")
    lora = state_dict_of(trained(patcher), architecture_of(patcher))
    for key_format, alpha_dtype in (("comfyui", torch.float32), ("kohya", dtype)):
        path = saved(lora, tmp_path, save_precision=precision, key_format=key_format)
        tensors = comfy.utils.load_torch_file(path, safe_load=True)
        assert {t.dtype for k, t in tensors.items() if k.endswith(".weight")} == {dtype}
        assert {t.dtype for k, t in tensors.items() if k.endswith(".alpha")} == {alpha_dtype}


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        ({"metadata": "{not json"}, "metadata: not JSON"),
        ({"metadata": "[1]"}, "not a JSON object"),
        ({"metadata": '{"sshs_model_hash": "x"}'}, "computed from the tensors"),
        ({"filename_prefix": " "}, "names no file"),
        ({"filename_prefix": "loras/"}, "names no file"),
        ({"key_format": "diffusers"}, "connect the model"),
    ],
)
def test_save_refuses_bad_input_before_it_writes(inputs, sentence, tmp_path):
    patcher = build("flux")
    lora = state_dict_of(trained(patcher), architecture_of(patcher))
    with pytest.raises(ValueError, match=sentence):
        saved(lora, tmp_path, **inputs)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("lumina2", "Lumina 2: diffusers converts only .*; choose comfyui or kohya"),
        ("sd15", r"diffusers has no name for input_blocks\.3\.0"),  # one residual block a level
    ],
)
def test_what_diffusers_could_not_read_is_refused_before_it_is_written(name, sentence, tmp_path):
    patcher = build(name)
    architecture = architecture_of(patcher)
    state = state_dict_of(trained(patcher), architecture)
    recorded = AdapterStateDict(state, {"ss_base_model_version": architecture.base_model_version})
    with pytest.raises(ValueError, match=f"key_format diffusers: {sentence}"):
        saved(recorded, tmp_path, key_format="diffusers")
    with pytest.raises(ValueError, match=f"key_format diffusers: {sentence}"):
        saved(state, tmp_path, key_format="diffusers", model=patcher)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_save_as_diffusers_knows_the_architecture_from_metadata_or_model(tmp_path, caplog):
    patcher = build("hunyuan_video")
    network, architecture = trained(patcher), architecture_of(patcher)
    state = state_dict_of(network, architecture)
    recorded = AdapterStateDict(state, {"ss_base_model_version": architecture.base_model_version})
    paths = [
        saved(recorded, tmp_path, key_format="diffusers"),
        saved(state, tmp_path, key_format="diffusers", model=patcher),
    ]
    one, other = (comfy.utils.load_torch_file(path, safe_load=True) for path in paths)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    loaded_by_core(patcher, paths[0], caplog)
