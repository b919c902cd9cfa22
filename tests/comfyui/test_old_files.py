"""States, LoRAs, calibrations, FP8 models and workflows of Braid 0.1.0 still work."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from host.prompts import prompt_nodes
from host.serve import Server
from host.workflows import named_widgets

OLD = Path(__file__).resolve().parent.parent / "files_of_0_1_0"
WORKFLOWS = json.loads((OLD / "workflow_nodes.json").read_text())
CASES = ("lora", "lokr", "loha")


@pytest.fixture(scope="module")
def server():
    """With the old files in its output folder."""
    with Server.start() as running:
        shutil.copytree(OLD / "output", running.base / "output", dirs_exist_ok=True)
        yield running


def assert_close(path, expected):
    ours, theirs = safetensors.torch.load_file(path), safetensors.torch.load_file(expected)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_an_old_state_resumes_to_what_the_old_version_made_of_it(server, case):
    prompt = json.loads((OLD / f"{case}.prompt.json").read_text())
    prompt["4"]["inputs"]["resume"] = "latest"
    prompt["8"]["inputs"]["steps"] = 6
    server.queue(prompt)
    folder = server.base / "output" / "loras" / f"old_{case}"
    assert (folder / f"old_{case}-step00000006.state").exists()
    assert_close(folder / f"old_{case}.safetensors", OLD / "at_step_6" / f"{case}.safetensors")


def test_an_old_state_of_other_settings_is_still_refused(server):
    prompt = json.loads((OLD / "lora.prompt.json").read_text())
    prompt["4"]["inputs"]["resume"] = "old_lora/old_lora-step00000002.state"
    prompt["3"]["inputs"]["rank_dropout"] = 0.2
    with pytest.raises(RuntimeError, match="was saved with network"):
        server.queue(prompt)


def test_old_checkpoints_and_shadows_average_to_the_same_loras(server):
    node = prompt_nodes(server.object_info())
    prompt = {
        "1": node("BraidLoadCheckpoints", folder="old_lora", pattern="*-step0000000[24].*"),
        "2": node(
            "BraidPostHocEma",
            checkpoints=["1", 0],
            method="sigma_rel",
            method__sigma_rel=0.2,
            filename_prefix="loras/new_ema",
        ),
        "3": node(
            "BraidEmaReconstruct",
            checkpoints=["1", 0],
            sigma_rel=0.1,
            filename_prefix="loras/new_shadow_ema",
        ),
    }
    server.queue(prompt)
    loras = server.base / "output" / "loras"
    assert_close(loras / "new_ema_00001_.safetensors", loras / "old_ema_00001_.safetensors")
    assert (loras / "new_shadow_ema_00001_.safetensors").exists()


def test_an_old_calibration_still_plans(server):
    node = prompt_nodes(server.object_info())
    prompt = {
        "1": node("BraidLoadCalibration", file="old_00001_.json"),
        "2": node(
            "BraidMagCachePlan",
            plan=["1", 0],
            steps=8,
            rule="planned",
        ),
        "3": node("PreviewAny", source=["2", 1]),
    }
    (text,) = server.queue(prompt)["outputs"]["3"]["text"]
    assert json.loads(text)["computed"] == 4


def test_an_old_fp8_model_loads_as_it_was_saved(server):
    node = prompt_nodes(server.object_info())
    prompt = {
        "1": node(
            "BraidFp8Loader",
            unet_name="old_fp8_block_00001_.safetensors",
        ),
        "2": node("BraidSaveFp8", model=["1", 0], filename_prefix="diffusion_models/new_fp8"),
    }
    server.queue(prompt)
    models = server.base / "output" / "diffusion_models"
    ours, theirs = (
        safetensors.torch.load_file(models / f"{name}_00001_.safetensors")
        for name in ("new_fp8", "old_fp8_block")
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(
            ours[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)
        )


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_an_old_workflow_opens_with_every_value_in_its_own_widget(server, workflow):
    schemas = server.object_info()
    for node in WORKFLOWS[workflow]:
        info = schemas[node["type"]]
        for name, kind, options, value in named_widgets(node, info):
            assert _fits(kind, options, value), (node["type"], name, value)
        declared = info["input"].get("required", {}) | info["input"].get("optional", {})
        assert {name.split(".")[0] for name in node["inputs"]} <= declared.keys()
        outputs = list(zip(info["output_name"], info["output"], strict=True))
        assert outputs[: len(node["outputs"])] == [tuple(output) for output in node["outputs"]]


def _fits(kind, options, value):
    if kind in ("INT", "FLOAT"):
        number = isinstance(value, int) or (kind == "FLOAT" and isinstance(value, float))
        return number and options["min"] <= value <= options["max"]
    if kind == "BOOLEAN":
        return isinstance(value, bool)
    return isinstance(value, str)
