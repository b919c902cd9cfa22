"""The MagCache nodes as the executor calls them: what is shown before a run is what it does."""

import dataclasses
import json
from pathlib import Path

import folder_paths
import pytest
import torch
from live_questions import answer_of, chart_of
from magcache_runs import sample
from tiny_models import build

from comfyui_braid.engine.comfyui.magcache.patch import magcache_of
from comfyui_braid.engine.magcache.plan import calibrated_name
from comfyui_braid.engine.magcache.presets import preset_named
from comfyui_braid.engine.texts import told
from comfyui_braid.nodes.magcache import (
    NODES,
    BraidLoadCalibration,
    BraidMagCache,
    BraidMagCacheCalibrate,
    BraidMagCacheCalibration,
    BraidMagCachePlan,
    BraidMagCacheReport,
)
from comfyui_braid.nodes.magcache.live import shown_name

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
STEPS = 12
PLANNED = {
    "rule": "planned",
    "speedup": 1.5,
    "warmup_steps": 2,
    "k": 6,
    "predict": "extrapolate",
    "max_error": 0.0,
}
PAPER = {
    "rule": "magcache",
    "threshold": 0.24,
    "retention_ratio": 0.2,
    "k": 6,
    "interpolation": "cumulative",
}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return build("flux_dev")


def run(patched, steps=STEPS):
    return {"samples": sample(patched, "flux_dev", steps=steps)}


def cached(model, rule, **inputs):
    return BraidMagCache.execute(model, inputs.pop("preset", "auto"), "0", rule, **inputs)


def calibrated(model, prefix="calibration"):
    calibrating, calibrator = BraidMagCacheCalibrate.execute(model).result
    return BraidMagCacheCalibration.execute(calibrator, run(calibrating), prefix).result


def reported(patched, latent):
    return json.loads(BraidMagCacheReport.execute(patched, latent).result[0])


@pytest.mark.parametrize("rule", [PLANNED, PAPER], ids=["planned", "magcache"])
@pytest.mark.parametrize("steps", [STEPS, 20])
def test_the_plan_node_shows_the_steps_that_the_run_then_skips(rule, steps, model):
    plan = calibrated(model)[0]
    image, report = BraidMagCachePlan.execute("FLUX.1-dev", "0", steps, rule, plan=plan).result
    patched, used = cached(model, rule, plan=plan).result
    ran = reported(patched, run(patched, steps))
    assert json.loads(report)["skipped"] == ran["skipped_steps"] != []
    assert used is plan and image.shape[-1] == 3


@pytest.mark.parametrize("preset", ["auto", "Qwen-Image"])
@pytest.mark.parametrize("part", [(0.0, 1.0), (0.25, 0.75)])
def test_the_strip_in_the_node_shows_the_steps_that_the_run_then_skips(preset, part, model):
    start, end = part
    output = cached(model, PAPER, preset=preset, start_percent=start, end_percent=end)
    patched, plan = output.result
    (strip,) = output.ui["braid_live"]
    ran = reported(patched, run(patched, plan.conditions.steps))
    assert strip["skipped"] == ran["skipped_steps"] != []
    widgets = dict(preset=plan.name, mag_ratios="0", start_percent=start, end_percent=end)
    widgets |= {name if name == "rule" else f"rule.{name}": value for name, value in PAPER.items()}
    body = {"node_id": "BraidMagCache", "values": widgets, "inputs": {}}
    assert chart_of("magcache", body)["skipped"] == strip["skipped"]


def test_a_saved_calibration_comes_back_also_after_an_editor_has_marked_it(model, folders):
    plan, ratios, _, _ = calibrated(model, "mine/flux")
    saved = folders / "output" / "magcache" / "mine" / "flux_00001_.json"
    assert BraidLoadCalibration.execute("mine/flux_00001_.json").result[0] == plan
    assert ratios.startswith("1.00000,") and len(ratios.split(",")) == STEPS
    saved.write_text(saved.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert BraidLoadCalibration.execute("mine/flux_00001_.json").result[0] == plan
    saved.write_text(saved.read_text(encoding="utf-8-sig")[:500], encoding="utf-8")
    with pytest.raises(ValueError, match="not a MagCache calibration: not JSON"):
        BraidLoadCalibration.execute("mine/flux_00001_.json")


def test_a_calibration_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'missing.json' is no saved calibration"):
        BraidLoadCalibration.execute("missing.json")


def test_an_empty_prefix_saves_nothing(model, folders):
    calibrated(model, " ")
    assert not (folders / "output" / "magcache").exists()


def test_a_report_before_any_run_and_of_a_model_without_a_cache_says_what_to_connect(model):
    patched = cached(model, PAPER).result[0]
    with pytest.raises(ValueError, match="no finished run with this model yet"):
        BraidMagCacheReport.execute(patched, {})
    with pytest.raises(ValueError, match="this model has no MagCache on it"):
        BraidMagCacheReport.execute(model, {})
    assert magcache_of(patched).last_report is None


def test_typed_ratios_win_over_the_preset_and_zero_takes_it(model):
    typed = BraidMagCache.execute(model, "auto", "1,1,1,1", PAPER).result[1]
    assert typed.curves[0].ratios == (1.0,) * 4
    assert cached(model, PAPER).result[1].name == "FLUX.1-dev"
    with pytest.raises(ValueError, match="mag_ratios is empty"):
        BraidMagCache.execute(model, "from mag_ratios", "0", PAPER)


@pytest.mark.parametrize("levels", [[1.0], []])
def test_a_plan_for_no_step_says_so(levels):
    with pytest.raises(ValueError, match=rf"sigmas: got {len(levels)} values"):
        BraidMagCachePlan.execute("FLUX.1-dev", "0", 20, PAPER, sigmas=torch.tensor(levels))


@pytest.mark.parametrize("node", NODES)
def test_every_input_and_output_has_a_tooltip_and_the_node_a_page(node):
    schema = node.define_schema()
    assert (DOCS / f"{schema.node_id}.md").is_file()
    for port in (*schema.inputs, *schema.outputs):
        assert port.tooltip, port.id


def test_a_calibrations_own_name_and_a_sentence_of_the_node_reach_the_page_in_its_language():
    preset = preset_named("FLUX.1-dev")
    assert told(shown_name(preset)) == "FLUX.1-dev"
    read_back = dataclasses.replace(preset, name=str(calibrated_name(preset.conditions)))
    assert told(shown_name(read_back))["text"] == "{model} calibrated at {steps} steps"

    widgets = {f"rule.{name}": value for name, value in PLANNED.items() if name != "rule"}
    widgets |= {"rule": "planned", "preset": "FLUX.1-dev", "mag_ratios": "0", "steps": 28}
    body = {"node_id": "BraidMagCachePlan", "values": widgets, "inputs": {}}
    sent = told(answer_of("magcache", body))["error"]
    assert sent["text"].startswith("rule 'planned' needs a calibration, and {name} is a list")
    assert sent["values"] == {"name": "'FLUX.1-dev'"}
