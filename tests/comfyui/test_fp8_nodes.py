import json
from pathlib import Path

import folder_paths
import pytest
import torch
from fp8_files import lora_state_dict, same_latent, sample, write_model
from safetensors.torch import save_file

from comfyui_braid.nodes.fp8 import BraidFp8Loader, BraidSaveFp8

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"


@pytest.fixture
def models(tmp_path, monkeypatch):
    write_model(tmp_path, monkeypatch)
    save_file(lora_state_dict("kohya"), tmp_path / "style.safetensors")
    for kind in ("diffusion_models", "loras"):
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], {".safetensors"})
        )
    folder_paths.filename_list_cache.clear()
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    yield tmp_path
    folder_paths.filename_list_cache.clear()


def load(granularity=None, **inputs):
    with torch.inference_mode():
        return BraidFp8Loader.execute(
            unet_name=inputs.pop("unet_name", "flux.safetensors"),
            granularity=granularity or {"granularity": "block", "block_size": 32},
            fp8_format="e4m3fn",
            **inputs,
        )


def test_the_loader_gives_a_model_its_report_and_a_chart(models):
    output = load()
    model, report = output.result
    report = json.loads(report)
    assert report["layers"]["double_blocks.0.img_attn.qkv"]["granularity"] == "block"
    layer = model.model.diffusion_model.get_submodule("double_blocks.0.img_attn.qkv")
    assert layer.weight._params.scale.shape == (384, 4, 1)
    (picture,) = output.ui.as_dict()["images"]
    assert (models / "temp" / picture["filename"]).is_file()


def test_modulation_reaches_the_policy_and_is_kept_unless_chosen(models):
    for inputs, quantized in (({}, False), ({"modulation": "fp8"}, True)):
        report = json.loads(load(**inputs).result[1])
        assert report["layers"]["double_blocks.0.img_mod.lin"]["quantized"] is quantized


@pytest.mark.parametrize(
    "excluded", ["^single_blocks\\.\n  img_mlp  ", r"[r'^single_blocks\.', r'img_mlp']"]
)
def test_patterns_one_a_line_or_as_musubi_s_list_and_a_lora_reach_the_policy(models, excluded):
    output = load(
        {"granularity": "tensor"},
        scale_search="mse",
        include_patterns="img_mod\n\n",
        exclude_patterns=excluded,
        lora_name="style.safetensors",
        lora_strength=0.5,
    )
    report = json.loads(output.result[1])
    quantized = {name for name, layer in report["layers"].items() if layer["quantized"]}
    assert "double_blocks.0.img_mod.lin" in quantized
    assert not any(name.startswith("single_blocks") or "img_mlp" in name for name in quantized)
    assert "style.safetensors merged at 0.5" in report["notes"][1]


def test_a_saved_model_comes_back_through_the_loader(models):
    model = load().result[0]
    with torch.inference_mode():
        (path,) = BraidSaveFp8.execute(model, "diffusion_models/fp8").result
    assert Path(path) == models / "output" / "diffusion_models" / "fp8_00001_.safetensors"
    Path(path).rename(models / "again.safetensors")
    folder_paths.filename_list_cache.clear()
    again = load({"granularity": "tensor"}, unet_name="again.safetensors")
    assert "saved by Braid" in json.loads(again.result[1])["notes"][0]
    assert same_latent(sample(again.result[0]), sample(model))


@pytest.mark.parametrize("node", [BraidFp8Loader, BraidSaveFp8])
def test_every_input_and_output_has_a_tooltip_and_the_node_a_page(node):
    schema = node.define_schema()
    assert (DOCS / f"{schema.node_id}.md").is_file()
    for port in (*schema.inputs, *schema.outputs):
        assert port.tooltip, port.id
