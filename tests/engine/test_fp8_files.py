import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_braid.engine.files import read_header, write_safetensors
from comfyui_braid.engine.fp8.model_file import comfy_quant, recognise, without_prefix
from comfyui_braid.engine.fp8.policy import Decision, Fp8Policy
from comfyui_braid.engine.fp8.source import map_tensors
from comfyui_braid.engine.fp8.stream import quantized_stream

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def weights(**extra):
    generator = torch.Generator().manual_seed(0)
    return {
        "blocks.0.q.weight": torch.randn(8, 128, generator=generator).bfloat16(),
        "blocks.0.q.bias": torch.randn(8, generator=generator).bfloat16(),
        "norm.weight": torch.randn(8, generator=generator),
        **extra,
    }


def test_mapped_tensors_equal_the_file(tmp_path):
    tensors = weights(empty=torch.empty(0, 3), flag=torch.tensor([True, False]))
    save_file(tensors, tmp_path / "a.safetensors", {"note": "kept"})
    source = map_tensors(tmp_path / "a.safetensors")
    assert source.metadata == {"note": "kept"}
    assert set(source.tensors) == set(tensors)
    assert all(torch.equal(source.tensors[key], tensors[key]) for key in tensors)


def test_any_shard_brings_all_and_a_missing_one_is_named(tmp_path):
    tensors = weights()
    names = list(tensors)
    for index in range(3):
        name = f"model-{index + 1:05d}-of-00003.safetensors"
        save_file({names[index]: tensors[names[index]]}, tmp_path / name)
    source = map_tensors(tmp_path / "model-00002-of-00003.safetensors")
    assert set(source.tensors) == set(tensors) and len(source.files) == 3
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="missing: model-00003-of-00003.safetensors"):
        map_tensors(tmp_path / "model-00001-of-00003.safetensors")


def test_a_pickled_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only .safetensors"):
        map_tensors(tmp_path / "model.ckpt")


def test_streamed_files_are_read_by_safetensors_itself(tmp_path):
    tensors = weights(codes=torch.randn(4, 4).to(FP8), odd=torch.arange(3, dtype=torch.uint8))
    tensors["view"] = torch.arange(12.0).view(3, 4).t()
    write_safetensors(tmp_path / "out.safetensors", tensors, {"a": "b"})
    back = load_file(tmp_path / "out.safetensors")
    assert set(back) == set(tensors)
    for key, tensor in tensors.items():
        same = back[key].view(torch.uint8) if tensor.dtype == FP8 else back[key]
        assert torch.equal(same, tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor)
    header = read_header(tmp_path / "out.safetensors")
    assert header.metadata == {"a": "b"} and header.data_start % 8 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stream_quantises_what_was_decided_and_keeps_the_rest(dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in weights().items()}
    tensors["head.weight"] = torch.randn(4, 8).to(dtype)
    decisions = {
        "blocks.0.q.weight": Decision(quantize=True, reason="chosen"),
        "head.weight": Decision(quantize=False, reason="kept"),
    }
    out, layers = {}, {}
    for streamed in quantized_stream(tensors, decisions, Fp8Policy(), CPU):
        out.update(streamed.tensors)
        if streamed.layer:
            layers[streamed.layer.name] = streamed.layer
    assert out["blocks.0.q.weight"].dtype == FP8
    assert out["blocks.0.q.weight_scale"].shape == (8, 2, 1)
    assert out["blocks.0.q.weight_scale"].dtype == torch.float32
    for key in ("blocks.0.q.bias", "norm.weight", "head.weight"):
        assert out[key] is tensors[key]  # no copy
    assert set(layers) == {"blocks.0.q", "head"}
    assert layers["blocks.0.q"].bytes_after == 8 * 128 + 8 * 2 * 4
    assert layers["head"].reason == "kept"


@pytest.mark.parametrize("weight", [torch.ones(8), torch.ones(0, 8), torch.ones(8, 8).int()])
@pytest.mark.parametrize("quantize", [True, False])
def test_a_weight_that_no_linear_layer_has_is_refused(quantize, weight):
    decisions = {"a.weight": Decision(quantize=quantize, reason="")}
    with pytest.raises(ValueError, match="a.weight is .*, which is no Linear's weight; .*damaged"):
        list(quantized_stream({"a.weight": weight}, decisions, Fp8Policy(), CPU))


def test_a_tensor_with_nan_is_named():
    tensors = weights()
    tensors["blocks.0.q.weight"][2, 5] = float("nan")
    decisions = {"blocks.0.q.weight": Decision(quantize=True, reason="")}
    with pytest.raises(ValueError, match=r"blocks\.0\.q\.weight: 1 values are NaN or Inf"):
        list(quantized_stream(tensors, decisions, Fp8Policy(), CPU))


def test_a_kept_linear_with_nan_is_named_too():
    tensors = weights(**{"head.weight": torch.full((4, 8), torch.nan)})
    decisions = {"head.weight": Decision(quantize=False, reason="kept")}
    with pytest.raises(ValueError, match=r"head\.weight: 32 values are NaN or Inf"):
        list(quantized_stream(tensors, decisions, Fp8Policy(), CPU))


def codes():
    return torch.randn(8, 128).to(FP8)


def test_a_float_file_is_not_recognised_as_fp8():
    assert recognise(weights(), {}) is None


@pytest.mark.parametrize(
    ("scale", "shape", "origin"),
    [
        (torch.rand(8, 2, 1).bfloat16(), (8, 2, 1), "musubi-tuner's block"),
        (torch.rand(8, 1).bfloat16(), (8, 1), "musubi-tuner's block- or channel"),
        (torch.tensor(0.5).bfloat16(), (), "musubi-tuner's per-tensor"),
    ],
)
def test_musubis_scale_weight_is_read_at_every_granularity(scale, shape, origin):
    tensors = weights()
    tensors["blocks.0.q.weight"] = codes()
    tensors["blocks.0.q.scale_weight"] = scale
    found = recognise(tensors, {})
    assert found.origin.startswith(origin) and found.scaled == ("blocks.0.q",)
    form = found.tensors
    assert form["blocks.0.q.weight_scale"].shape == shape
    assert form["blocks.0.q.weight_scale"].dtype == torch.float32
    assert torch.equal(form["blocks.0.q.weight_scale"].flatten(), scale.float().flatten())
    assert "blocks.0.q.scale_weight" not in form
    assert json.loads(bytes(form["blocks.0.q.comfy_quant"].tolist()))["format"] == "float8_e4m3fn"


@pytest.mark.parametrize("where", ["marker tensor", "header", "scaled_fp8"])
def test_comfyuis_scaled_fp8_is_recognised(where):
    tensors = weights()
    tensors["blocks.0.q.weight"] = codes()
    tensors["blocks.0.q.weight_scale"] = torch.tensor(0.5)
    metadata = {}
    if where == "marker tensor":
        tensors["blocks.0.q.comfy_quant"] = comfy_quant("float8_e4m3fn")
    elif where == "header":
        layers = {"blocks.0.q": {"format": "float8_e4m3fn"}}
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    else:
        tensors["scaled_fp8"] = torch.tensor([0.0, 0.0])
        tensors["blocks.0.q.scale_weight"] = tensors.pop("blocks.0.q.weight_scale")
    found = recognise(tensors, metadata)
    assert found.origin == "ComfyUI's scaled FP8" and "scaled_fp8" not in found.tensors


def test_a_plain_cast_is_loaded_as_what_it_is():
    tensors = weights()
    tensors["blocks.0.q.weight"] = codes()
    found = recognise(tensors, {})
    assert "without scales" in found.origin and found.scaled == ()


def test_formats_that_comfyui_knows_better_are_left_to_it():
    tensors = weights(**{"blocks.0.q.comfy_quant": comfy_quant("nvfp4")})
    found = recognise(tensors, {})
    assert "nvfp4" in found.origin and found.scaled == ()


def test_a_newer_braid_format_is_refused():
    tensors = weights(**{"blocks.0.q.comfy_quant": comfy_quant("braid_float8_e4m3fn_spiral")})
    with pytest.raises(ValueError, match="newer Braid"):
        recognise(tensors, {})


@pytest.mark.parametrize("shape", [(2, 4), (8, 2, 4), (8, 0, 1), (8, 3, 1), (128,), (1, 128)])
def test_a_scale_of_another_shape_is_refused_and_the_layer_named(shape):
    tensors = weights()
    tensors["blocks.0.q.weight"] = codes()
    tensors["blocks.0.q.weight_scale"] = torch.rand(shape)
    with pytest.raises(ValueError, match=rf"blocks\.0\.q: a scale of shape \[{shape[0]}"):
        recognise(tensors, {})


@pytest.mark.parametrize("shape", [(8,), (8, 4, 3, 3)])
def test_scaled_fp8_that_is_no_linear_weight_is_refused(shape):
    tensors = {"conv.weight": torch.randn(shape).to(FP8), "conv.weight_scale": torch.tensor(0.5)}
    with pytest.raises(ValueError, match=r"conv: scaled FP8 on a weight of shape \[8"):
        recognise(tensors, {})


def marker_of(found, layer="blocks.0.q"):
    return json.loads(bytes(found.tensors[f"{layer}.comfy_quant"].tolist()))


@pytest.mark.parametrize("elements", [0, 1, 2])
def test_comfyuis_older_marker_keeps_its_setting(elements):
    tensors = weights(scaled_fp8=torch.zeros(elements, dtype=FP8))
    tensors["blocks.0.q.weight"] = codes()
    tensors["blocks.0.q.scale_weight"] = torch.tensor(0.5)
    marker = marker_of(recognise(tensors, {}))
    assert marker.get("full_precision_matrix_mult", False) == (elements == 2)


def test_a_layers_own_setting_is_kept():
    tensors = weights()
    tensors["blocks.0.q.weight"] = codes()
    tensors["blocks.0.q.weight_scale"] = torch.rand(8, 1)
    setting = {"full_precision_matrix_mult": True}
    tensors["blocks.0.q.comfy_quant"] = comfy_quant("braid_float8_e4m3fn_channel", **setting)
    assert marker_of(recognise(tensors, {})) == {"format": "float8_e4m3fn", **setting}


@pytest.mark.parametrize(
    "text",
    [
        b"[",
        b"{}",
        b"1",
        b'{"format": 1}',
        b'{"format": "a\\u0000"}',
        b"[" * 1000,
        b"\xff",
        b"",
        b" " * 70000,
    ],
)
def test_a_marker_that_names_no_format_is_refused_by_its_layer(text):
    tensors = weights(
        **{"blocks.0.q.weight": codes(), "blocks.0.q.weight_scale": torch.tensor(0.5)}
    )
    tensors["blocks.0.q.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"blocks\.0\.q\.comfy_quant"):
        recognise(tensors, {})


@pytest.mark.parametrize(
    "header", ["[]", "{}", '{"layers": []}', '{"layers": {"a": {}}}', '{"layers": {"a": 1}}', "{"]
)
def test_a_header_of_quantised_layers_that_is_none_is_refused(header):
    with pytest.raises(ValueError, match="names no layers|names no format|not JSON"):
        recognise(weights(), {"_quantization_metadata": header})


def test_codes_without_values_and_scales_that_are_no_numbers_are_refused():
    empty = {"a.weight": torch.zeros(0, 8).to(FP8), "a.weight_scale": torch.tensor(0.5)}
    whole = {"a.weight": codes(), "a.weight_scale": torch.tensor(1)}
    for tensors in (empty, whole):
        with pytest.raises(ValueError, match="a: .* are no FP8 weight"):
            recognise(tensors, {})
    one = {"a.weight": codes(), "a.scale_weight": torch.tensor(0.5), "a.scale_input": torch.ones(2)}
    with pytest.raises(ValueError, match="a.scale_input has shape"):
        recognise(one, {})


def test_of_many_missing_shards_a_few_are_named(tmp_path):
    save_file(weights(), tmp_path / "m-00001-of-09999.safetensors")
    with pytest.raises(ValueError, match="one of 9999 shards; missing: .* …") as refusal:
        map_tensors(tmp_path / "m-00001-of-09999.safetensors")
    assert len(str(refusal.value)) < 300


def test_a_bank_of_experts_is_left_to_comfyui_as_it_is():
    tensors = weights(**{"experts.comfy_quant": comfy_quant("float8_e4m3fn", num_experts=4)})
    tensors["experts.weight"] = torch.randn(4, 8, 128).to(FP8)
    tensors["experts.weight_scale"] = torch.rand(4)
    found = recognise(tensors, {})
    assert "left to ComfyUI" in found.origin and found.scaled == ()
    assert all(found.tensors[key] is tensor for key, tensor in tensors.items())


def test_a_full_checkpoint_loses_its_prefix_in_the_header_too(tmp_path):
    header = {"layers": {"model.diffusion_model.blocks.0.q": {"format": "float8_e4m3fn"}}}
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in weights().items()}
    save_file(
        {**tensors, "vae.weight": torch.ones(2)},
        tmp_path / "all.safetensors",
        {"_quantization_metadata": json.dumps(header), "note": "kept"},
    )
    source = without_prefix(map_tensors(tmp_path / "all.safetensors"), "model.diffusion_model.")
    assert set(source.tensors) == set(weights()) and source.metadata["note"] == "kept"
    layers = json.loads(source.metadata["_quantization_metadata"])["layers"]
    assert layers == {"blocks.0.q": {"format": "float8_e4m3fn"}}
    assert without_prefix(source, "model.diffusion_model.") is source


def test_scales_of_powers_of_two_can_be_read(tmp_path):
    scales = torch.tensor([1.0, 2.0]).to(torch.float8_e8m0fnu)
    save_file({"scale": scales}, tmp_path / "mx.safetensors")
    assert map_tensors(tmp_path / "mx.safetensors").tensors["scale"].dtype == scales.dtype


def test_a_missing_scale_among_scaled_layers_is_refused():
    tensors = weights()
    tensors["blocks.0.q.weight"] = codes()
    tensors["blocks.0.q.scale_weight"] = torch.rand(8, 1)
    tensors["blocks.1.q.weight"] = codes()
    with pytest.raises(ValueError, match=r"no scale \(blocks\.1\.q"):
        recognise(tensors, {})
