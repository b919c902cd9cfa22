import json

import comfy.model_management
import comfy.sd
import pytest
import torch
from fp8_files import (
    ARCHITECTURES,
    lora_state_dict,
    reference,
    same_latent,
    sample,
    write_model,
)

from comfyui_braid.engine.comfyui.fp8.loader import Fp8Request, load_fp8
from comfyui_braid.engine.comfyui.fp8.save import save_fp8
from comfyui_braid.engine.files import read_header
from comfyui_braid.engine.fp8.policy import Fp8Policy


def load(path, granularity="block", **policy):
    with torch.inference_mode():
        return load_fp8(
            Fp8Request(path=path, policy=Fp8Policy(granularity=granularity, **policy))
        ).patcher


def save(patcher, path):
    with torch.inference_mode():
        save_fp8(patcher, path)
    return path


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_what_is_saved_loads_back_equal(name, granularity, tmp_path, monkeypatch):
    model = load(write_model(tmp_path, monkeypatch, name), granularity)
    path = save(model, tmp_path / "saved.safetensors")
    again = load(path, "tensor" if granularity != "tensor" else "block")
    first, second = (
        model.model.diffusion_model.state_dict(),
        again.model.diffusion_model.state_dict(),
    )
    assert set(first) == set(second)
    for key, tensor in first.items():
        same = torch.equal(
            tensor.flatten().view(torch.uint8), second[key].flatten().view(torch.uint8)
        )
        assert same, key
    assert same_latent(sample(again, name), sample(model, name))


@pytest.mark.parametrize("fp8_format", ["e4m3fn", "e5m2"])
def test_stock_comfyui_loads_per_tensor_files_and_samples_the_same(fp8_format, flux_file, tmp_path):
    model = load(flux_file, "tensor", fp8_format=fp8_format)
    path = save(model, tmp_path / "saved.safetensors")
    assert same_latent(sample(reference(path)), sample(model))
    layers = json.loads(read_header(path).metadata["_quantization_metadata"])["layers"]
    assert layers["single_blocks.0.linear1"] == {"format": f"float8_{fp8_format}"}


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_stock_comfyui_refuses_finer_files_and_names_the_format(granularity, flux_file, tmp_path):
    path = save(load(flux_file, granularity), tmp_path / "saved.safetensors")
    with pytest.raises(KeyError, match=f"braid_float8_e4m3fn_{granularity}"):
        reference(path)


def test_comfyuis_own_save_node_writes_a_file_that_stock_refuses_and_we_load(flux_file, tmp_path):
    model = load(flux_file)
    path = tmp_path / "core.safetensors"
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(path), model)
    with pytest.raises(KeyError, match="braid_float8_e4m3fn_block"):
        reference(path)
    assert same_latent(sample(load(path)), sample(model))


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_comfyuis_own_save_node_saves_the_lora_with_the_model(
    granularity, loaded, flux_file, tmp_path
):
    model = load(flux_file, granularity)
    before = sample(model)
    with torch.inference_mode():
        lora = lora_state_dict("comfyui", size=12.0)
        patched = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0].clone()
    changed = sample(patched)
    with torch.inference_mode():
        if not loaded:
            comfy.model_management.unload_all_models()
        comfy.sd.save_checkpoint(str(tmp_path / "core.safetensors"), patched)
    saved = sample(load(tmp_path / "core.safetensors"))
    effect = (saved - before).mul(changed - before).sum() / (changed - before).square().sum()
    assert float(effect) == pytest.approx(1, abs=0.05)
    assert torch.equal(sample(model), before) and torch.equal(sample(patched), changed)


def test_a_model_with_a_lora_is_refused(flux_file, tmp_path):
    with torch.inference_mode():
        lora = comfy.sd.load_lora_for_models(
            load(flux_file), None, lora_state_dict("comfyui"), 1.0, 0
        )[0]
    with pytest.raises(ValueError, match="carries 2 patches"):
        save(lora, tmp_path / "saved.safetensors")
    assert not (tmp_path / "saved.safetensors").exists()


def test_the_base_is_saved_even_while_a_clone_with_a_lora_is_loaded(flux_file, tmp_path):
    model = load(flux_file, "tensor")
    before = sample(model)
    with torch.inference_mode():
        lora = comfy.sd.load_lora_for_models(model, None, lora_state_dict("comfyui"), 1.0, 0)[0]
    sample(lora)
    path = save(model, tmp_path / "saved.safetensors")
    assert same_latent(sample(load(path)), before)


def test_a_model_without_fp8_is_refused(flux_file, tmp_path):
    with pytest.raises(ValueError, match="no FP8 weights"):
        save(reference(flux_file), tmp_path / "saved.safetensors")
