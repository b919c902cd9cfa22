import gc
import json

import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from fp8_files import (
    ARCHITECTURES,
    distance,
    lora_state_dict,
    reference,
    sample,
    state_dict,
    write_model,
)
from safetensors.torch import save_file

from comfyui_braid.engine.comfyui.fp8.held import held_bytes
from comfyui_braid.engine.comfyui.fp8.loader import Fp8Request, load_fp8
from comfyui_braid.engine.comfyui.fp8.save import save_fp8
from comfyui_braid.engine.fp8.policy import PRESETS, Fp8Policy, LayerPatterns
from comfyui_braid.engine.fp8.stream import quantize_weight

POLICIES = {
    "tensor": Fp8Policy(granularity="tensor"),
    "channel": Fp8Policy(granularity="channel"),
    "block": Fp8Policy(),
    "block+mse": Fp8Policy(scale_search="mse"),
}


def load(path, policy=POLICIES["block"], **kwargs):
    with torch.inference_mode():
        return load_fp8(Fp8Request(path=path, policy=policy, **kwargs))


def weight_of(patcher, name):
    return patcher.model.diffusion_model.get_submodule(name).weight


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_granularity_samples_far_closer_to_bf16_than_a_plain_cast(
    name, tmp_path, monkeypatch
):
    path = write_model(tmp_path, monkeypatch, name)
    exact = sample(reference(path), name)
    with torch.inference_mode():
        cast = comfy.sd.load_diffusion_model(
            str(path), model_options={"dtype": torch.float8_e4m3fn}
        )
    plain = distance(sample(cast, name), exact)
    errors = {
        key: distance(sample(load(path, p).patcher, name), exact) for key, p in POLICIES.items()
    }
    assert max(errors.values()) < 0.35 * plain
    assert errors["block+mse"] < errors["block"] < 1.1 * errors["tensor"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_exclude_pattern_of_a_preset_keeps_a_layer_of_the_real_model(
    name, tmp_path, monkeypatch
):
    report = load(write_model(tmp_path, monkeypatch, name)).report
    architecture = "wan2.1" if name == "wan" else name
    reasons = {layer.reason for layer in report.layers if not layer.quantized}
    for pattern in PRESETS[architecture].exclude:
        assert f"{architecture} preset keeps {pattern!r}" in reasons
    assert any(layer.quantized for layer in report.layers)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_weights_are_held_in_fp8_and_equal_the_engines(policy, flux_file):
    loaded = load(flux_file, POLICIES[policy])
    weight = weight_of(loaded.patcher, "single_blocks.0.linear1")
    assert isinstance(weight, QuantizedTensor) and weight._qdata.dtype == torch.float8_e4m3fn
    source = state_dict("flux")["single_blocks.0.linear1.weight"]
    made = quantize_weight(source, POLICIES[policy], torch.device("cpu"))
    assert torch.equal(weight._qdata.view(torch.uint8), made.codes.view(torch.uint8))
    assert torch.equal(weight._params.scale, made.scale)
    native = weight._layout_cls.startswith("TensorCoreFP8")
    assert native == (policy == "tensor")
    kept = weight_of(loaded.patcher, "single_blocks.0.modulation.lin")
    assert not isinstance(kept, QuantizedTensor)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("layer", ["double_blocks.0.img_attn.proj", "single_blocks.0.linear1"])
def test_a_linear_is_right_under_inference_mode_no_grad_and_grad(policy, layer, flux_file):
    linear = load(flux_file, POLICIES[policy]).patcher.model.diffusion_model.get_submodule(layer)
    dense = linear.weight.dequantize().clone()
    bias = linear.bias.clone()
    for shape in ((5, 128), (2, 5, 128), (2, 3, 5, 128)):
        x = torch.randn(shape)
        expected = x @ dense.t() + bias
        with torch.inference_mode():
            assert torch.allclose(linear(x), expected, atol=1e-4)
        with torch.no_grad():
            assert torch.allclose(linear(x), expected, atol=1e-4)
        x.requires_grad_(True)
        y = linear(x)
        assert torch.allclose(y, expected, atol=1e-4)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.allclose(grad, 2 * expected @ dense, rtol=1e-4, atol=1e-3)


def test_autograd_keeps_the_codes_and_not_a_dequantised_copy(flux_file):
    linear = load(flux_file).patcher.model.diffusion_model.get_submodule("single_blocks.0.linear1")
    kept = []
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    weights = [t for t in kept if t.numel() == linear.weight.numel()]
    assert all(isinstance(t, QuantizedTensor) for t in weights)


@pytest.mark.parametrize("policy", ["channel", "block"])
def test_weights_survive_moving_cloning_and_detaching(policy, flux_file):
    weight = weight_of(load(flux_file, POLICIES[policy]).patcher, "single_blocks.0.linear1")
    dense = weight.dequantize()
    for copy in (weight.clone(), weight.detach(), weight.to("cpu"), weight.t().t()):
        assert isinstance(copy, QuantizedTensor)
        assert torch.equal(copy.dequantize(), dense)
    assert torch.equal(weight.t().dequantize(), dense.t())
    half = weight.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.dequantize(), dense.to(torch.bfloat16))
    there = torch.empty_like(weight)
    there.copy_(weight)
    assert torch.equal(there.dequantize(), dense)


@pytest.mark.parametrize("policy", ["channel", "block"])
def test_a_compiled_linear_equals_the_eager_one(policy, flux_file):
    linear = load(flux_file, POLICIES[policy]).patcher.model.diffusion_model.get_submodule(
        "single_blocks.0.linear1"
    )
    x = torch.randn(4, 128)
    weight = linear.weight.to("cpu").clone()
    compiled = torch.compile(
        lambda x, w: torch.nn.functional.linear(x, w), backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, weight)
        assert torch.allclose(compiled(x, weight), expected, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_clone_unload_reload_and_second_queue_give_the_same_latent(policy, flux_file):
    import comfy.model_management as mm

    patcher = load(flux_file, POLICIES[policy]).patcher
    first = sample(patcher)
    assert torch.equal(sample(patcher), first)
    assert torch.equal(sample(patcher.clone()), first)
    with torch.inference_mode():
        mm.unload_all_models()
    assert torch.equal(sample(patcher), first)
    again = load(flux_file, POLICIES[policy]).patcher
    assert torch.equal(sample(again), first)
    reload, arguments = patcher.cached_patcher_init
    with torch.inference_mode():
        reloaded = reload(*arguments, disable_dynamic=True)
    assert torch.equal(sample(reloaded), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_source_precision_loads(dtype, tmp_path, monkeypatch):
    path = write_model(tmp_path, monkeypatch, dtype=dtype)
    exact = sample(reference(path))
    assert distance(sample(load(path).patcher), exact) < 0.01


def test_full_checkpoints_and_shards_give_the_same_model(flux_file, tmp_path):
    tensors = state_dict("flux")
    whole = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    whole["vae.decoder.conv_in.weight"] = torch.randn(4, 4, 3, 3)
    save_file(whole, tmp_path / "checkpoint.safetensors")
    keys = sorted(tensors)
    for index in range(2):
        part = {key: tensors[key] for key in keys[index::2]}
        save_file(part, tmp_path / f"shard-{index + 1:05d}-of-00002.safetensors")
    first = sample(load(flux_file).patcher)
    assert torch.equal(sample(load(tmp_path / "checkpoint.safetensors").patcher), first)
    assert torch.equal(sample(load(tmp_path / "shard-00001-of-00002.safetensors").patcher), first)


def test_an_unknown_model_is_refused(tmp_path):
    save_file({"layer.weight": torch.randn(8, 8)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"odd\.safetensors: ComfyUI does not know this model"):
        load(tmp_path / "odd.safetensors")


def test_patterns_that_quantise_nothing_are_refused_with_names_of_layers(flux_file):
    policy = Fp8Policy(patterns=LayerPatterns(exclude=("blocks",)))
    with pytest.raises(ValueError, match="no layer of flux.safetensors is quantised"):
        load(flux_file, policy)


def test_nan_in_the_file_names_its_tensor(tmp_path, monkeypatch):
    path = write_model(tmp_path, monkeypatch)
    tensors = state_dict("flux")
    tensors["double_blocks.1.img_mlp.0.weight"][3, 4] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"double_blocks\.1\.img_mlp\.0\.weight: 1 values are NaN"):
        load(path)


def test_musubis_block_wise_file_loads_exactly(flux_file, tmp_path):
    policy = Fp8Policy(scale_rounding="musubi")
    tensors = state_dict("flux")
    for key in list(tensors):
        if "img_attn.proj.weight" in key or "linear1.weight" in key:
            made = quantize_weight(tensors[key], policy, torch.device("cpu"))
            tensors[key] = made.codes
            tensors[key.replace(".weight", ".scale_weight")] = made.scale.bfloat16()
    path = tmp_path / "musubi.safetensors"
    save_file(tensors, path)
    loaded = load(path)
    assert "musubi-tuner's block" in loaded.report.notes[0]
    weight = weight_of(loaded.patcher, "single_blocks.0.linear1")
    assert weight._params.scale.dtype == torch.float32
    assert distance(sample(loaded.patcher), sample(reference(flux_file))) < 0.01


def test_a_plain_fp8_cast_loads_as_comfyui_loads_it(flux_file, tmp_path):
    tensors = {
        key: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
        for key, tensor in state_dict("flux").items()
    }
    path = tmp_path / "plain.safetensors"
    save_file(tensors, path)
    loaded = load(path)
    assert "without scales" in loaded.report.notes[0]
    assert torch.equal(sample(loaded.patcher), sample(reference(path)))


def test_a_lora_cannot_be_merged_into_a_file_that_is_fp8_already(flux_file, tmp_path):
    tensors = state_dict("flux")
    tensors["single_blocks.0.linear1.weight"] = tensors["single_blocks.0.linear1.weight"].to(
        torch.float8_e4m3fn
    )
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(lora_state_dict("kohya"), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is FP8 already .* use Load LoRA after"):
        load(tmp_path / "plain.safetensors", lora=tmp_path / "lora.safetensors")


def test_the_report_is_json_with_every_linear_and_its_reason(flux_file):
    report = json.loads(json.dumps(load(flux_file).report.to_json()))
    assert report["layers"]["img_in"]["quantized"] is False
    entry = report["layers"]["double_blocks.0.img_attn.qkv"]
    assert entry["quantized"] and entry["granularity"] == "block"
    assert 2.0 < entry["relative_rms_percent"] < 3.0 and 30 < entry["decibel"] < 34
    total = sum(tensor.nbytes for tensor in state_dict("flux").values())
    assert report["bytes_before"] == total > report["bytes_after"]


@pytest.mark.parametrize("name", ["flux", "hunyuan_video"])
def test_modulation_in_fp8_makes_the_model_smaller_and_its_samples_little_worse(
    name, tmp_path, monkeypatch
):
    path = write_model(tmp_path, monkeypatch, name)
    exact = sample(reference(path), name)
    kept, small = load(path), load(path, Fp8Policy(modulation="fp8"))
    modulation = [
        layer
        for layer in small.report.layers
        if layer.name.endswith(("_mod.lin", ".modulation.lin"))
    ]
    assert modulation and all(layer.quantized for layer in modulation)
    layers = zip(kept.report.layers, small.report.layers, strict=True)
    assert sum(a != b for a, b in layers) == len(modulation)
    weights = sum(layer.bytes_before for layer in modulation)  # bf16, held in float32 on a CPU
    saved = kept.report.to_json()["bytes_after"] - small.report.to_json()["bytes_after"]
    assert saved == 2 * weights - sum(layer.bytes_after for layer in modulation)
    error = distance(sample(kept.patcher, name), exact)
    assert error < distance(sample(small.patcher, name), exact) < 2 * error


def live_storages():
    """Address → bytes of every storage that a tensor in this process holds."""
    gc.collect()
    # the parts of a quantised tensor are plain tensors
    plain = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in plain if t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("again", [False, True], ids=["quantised", "saved and loaded"])
@pytest.mark.parametrize("granularity", ["tensor", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["cast", "not cast"])
def test_bytes_after_is_what_the_loaded_model_holds(
    dtype, granularity, again, tmp_path, monkeypatch
):
    path = write_model(tmp_path, monkeypatch, "flux", dtype)
    loaded = load(path, POLICIES[granularity])
    if again:
        save_fp8(loaded.patcher, tmp_path / "fp8.safetensors")
        loaded = load(tmp_path / "fp8.safetensors")
    report = loaded.report.to_json()
    model = loaded.patcher.model
    kept = model.diffusion_model.img_in.weight
    cast = dtype != torch.float32
    assert kept.dtype == torch.float32  # what a CPU computes in
    assert report["bytes_after"] == sum(held_bytes(model.diffusion_model).values())
    if not again:
        entry = report["layers"]["img_in"]
        assert entry["bytes_after"] == kept.nbytes == entry["bytes_before"] * (2 if cast else 1)
    del kept
    loaded.patcher.cached_patcher_init = None
    with_it = live_storages()
    del model.diffusion_model
    gone = with_it.keys() - live_storages().keys()
    assert sum(with_it[place] for place in gone) == report["bytes_after"]
