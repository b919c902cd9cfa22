"""The EMA nodes in the host: files of a run to averaged LoRAs that ComfyUI's own nodes take."""

import json
import logging
import os

import comfy.model_management as mm
import comfy_extras.nodes_train as core_training
import execution
import folder_paths
import pytest
import safetensors.torch
import torch
from host.awaiting import awaited
from live_questions import chart_of
from tiny_models import build

import nodes as core_nodes
from comfyui_braid.engine.checkpoints import AdapterStateDict, Checkpoints
from comfyui_braid.engine.ema import merge
from comfyui_braid.engine.ema.shadows import Shadows
from comfyui_braid.engine.files import read_header
from comfyui_braid.nodes.ema.nodes import (
    NODES,
    BraidEmaReconstruct,
    BraidEmaSweep,
    BraidPostHocEma,
    parse_schedule,
)
from comfyui_braid.nodes.training import BraidCheckpointing
from comfyui_braid.nodes.training import checkpoints as checkpoint_nodes
from comfyui_braid.nodes.training.checkpoints import BraidLoadCheckpoints

SIGMA_REL = {"method": "sigma_rel", "sigma_rel": 0.2}
METHODS = [
    SIGMA_REL,
    {"method": "sigma_rel_musubi", "sigma_rel": 0.2},
    {"method": "beta", "beta": 0.9},
    {"method": "beta_ramp", "beta": 0.9, "beta2": 0.95},
]
PLAIN = dict(sort="step", first=1, last=0, space="factors", filename_prefix="loras/ema/ema")


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """ComfyUI's output folder for one test."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    (tmp_path / "loras").mkdir()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        "loras",
        ([str(tmp_path / "loras")], {".safetensors"}),
    )
    return tmp_path


def adapter(kohya: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """A rank-4 LoRA on every block Linear of the tiny FLUX, under ComfyUI's or kohya's keys."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in build("flux").model.diffusion_model.named_modules():
        if not isinstance(module, torch.nn.Linear) or "blocks" not in name:
            continue
        key = f"lora_unet_{name.replace('.', '_')}" if kohya else f"diffusion_model.{name}"
        down, up = (4, module.in_features), (module.out_features, 4)
        tensors[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(4.0)
    return tensors


def write_run(folder, count=4, kohya=False, shadows=True):
    """Checkpoints at steps 100, 200 … and the shadows of the run that saved them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = adapter(kohya)
    live = {key: value.clone() for key, value in tensors.items() if not key.endswith("alpha")}
    alphas = {key: value for key, value in tensors.items() if key.endswith("alpha")}
    kept = Shadows(live, update_every_steps=100)
    for index in range(count):
        step = 100 * (index + 1)
        for value in live.values():
            value.mul_(1.1)
        kept.update(step)
        metadata = {"ss_steps": str(step), "ss_base_model_version": "flux"}
        path = folder / f"run-step{step:08d}.safetensors"
        safetensors.torch.save_file(live | alphas, path, metadata)
    if shadows:
        kept.write(folder / "run-shadows.safetensors", alphas, metadata)


def load(folder="run", pattern="*.safetensors", **path) -> Checkpoints:
    return BraidLoadCheckpoints.execute(folder=folder, pattern=pattern, **path).result[0]


def averaged(checkpoints, method=SIGMA_REL, **changes):
    """(lora, image, report, path) as the executor gets them: under inference mode."""
    with torch.inference_mode():
        return BraidPostHocEma.execute(
            checkpoints=checkpoints, method=method, **PLAIN | changes
        ).result


def patched_keys(patcher) -> set[str]:
    return set(patcher.patches)


@pytest.mark.parametrize("kohya", [False, True], ids=["comfyui", "kohya"])
@pytest.mark.parametrize("prefix", ["loras/ema/ema", ""], ids=["saved", "in-memory"])
def test_the_lora_goes_into_cores_loader_with_every_key_matched(kohya, prefix, output, caplog):
    write_run(output / "loras" / "run", kohya=kohya)
    lora, _, _, path = averaged(load(), filename_prefix=prefix)
    model = build("flux")
    with caplog.at_level(logging.WARNING):
        patched = core_training.LoraModelLoader.execute(model, lora, 1.0).result[0]
    assert "not loaded" not in caplog.text
    assert len(patched_keys(patched)) == sum("lora_up" in key for key in lora) > 20
    assert bool(path) == bool(prefix)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["method"])
def test_the_saved_file_loads_in_cores_lora_loader_with_every_key_matched(method, output, caplog):
    write_run(output / "loras" / "run")
    lora, image, report, path = averaged(load(), method)
    assert path == str(output / "loras" / "ema" / "ema_00001_.safetensors")
    model = build("flux")
    with caplog.at_level(logging.WARNING):
        loaded = core_nodes.LoraLoaderModelOnly().load_lora_model_only(
            model, "ema/ema_00001_.safetensors", 1.0
        )[0]
    assert "not loaded" not in caplog.text
    assert len(patched_keys(loaded)) == sum("lora_up" in key for key in lora)
    assert averaged(load(), method)[3].endswith("ema_00002_.safetensors")
    assert image.shape[0] == 1 and image.shape[-1] == 3
    assert {"files", "steps", "betas", "weights", "centre_of_mass", "sigma_rel"} <= set(
        json.loads(report)
    )


@pytest.mark.parametrize("space", ["factors", "product"])
def test_cores_save_lora_takes_the_average_that_was_only_in_memory(space, output):
    write_run(output / "loras" / "run")
    lora, _, _, path = averaged(load(), space=space, filename_prefix="")
    assert path == "" and isinstance(lora, AdapterStateDict)
    assert lora.metadata["ss_base_model_version"] == "flux"
    core_training.SaveLoRA.execute(lora, "loras/core", 400)
    saved = safetensors.torch.load_file(output / "loras" / "core_400_steps_00001_.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in lora.items())
    assert load(".", "core*").files[0].step == 400


def test_cancelling_leaves_no_file_and_rises(output, monkeypatch):
    write_run(output / "loras" / "run")
    run = load()
    monkeypatch.setattr(merge, "CHUNK_ELEMENTS", 100)
    mm.interrupt_current_processing(True)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            averaged(run)
    finally:
        mm.interrupt_current_processing(False)
    assert not list((output / "loras" / "ema").glob("*"))


def test_a_reconstruction_loads_with_every_key_matched_and_says_how_near_it_is(output, caplog):
    write_run(output / "loras" / "run")
    with torch.inference_mode():
        lora, report, image = BraidEmaReconstruct.execute(
            checkpoints=load(), sigma_rel=0.1, filename_prefix="loras/ema/shadow"
        ).result
    said = json.loads(report)
    assert sum(said["coefficients"]) == pytest.approx(1) and said["profile_error"] < 0.01
    assert "modelspec.merged_from" in read_header(output / said["path"]).metadata
    with caplog.at_level(logging.WARNING):
        patched = core_training.LoraModelLoader.execute(build("flux"), lora, 1.0).result[0]
    assert "not loaded" not in caplog.text and image.shape[-1] == 3
    assert len(patched_keys(patched)) == sum("lora_up" in key for key in lora)


@pytest.mark.parametrize("source", ["checkpoints", "shadows"])
def test_a_sweep_gives_one_lora_and_one_label_for_each_width(source, output):
    write_run(output / "loras" / "run")
    with torch.inference_mode():
        loras, labels = BraidEmaSweep.execute(
            checkpoints=load(), sigma_rels="0.05,0.1\n 0.25", source=source
        ).result
    assert labels == ["sigma_rel 0.05", "sigma_rel 0.1", "sigma_rel 0.25"]
    key = next(key for key in loras[0] if "lora_up" in key)
    sizes = [float(lora[key].double().norm()) for lora in loras]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3  # the weights only grow
    outputs = BraidEmaSweep.define_schema().outputs
    assert all(each.is_output_list for each in outputs)


@pytest.mark.parametrize("text", ["", "0.1, x", "0.1, 0.3", "-1"])
def test_widths_that_cannot_be_are_refused_in_one_sentence(text, output):
    write_run(output / "loras" / "run")
    with pytest.raises(ValueError, match="sigma_rel"):
        BraidEmaSweep.execute(checkpoints=load(), sigma_rels=text)


def test_a_run_without_shadows_is_told_how_to_get_them(output):
    write_run(output / "loras" / "run", shadows=False)
    with pytest.raises(ValueError, match="ema_shadows on"):
        BraidEmaReconstruct.execute(checkpoints=load(), sigma_rel=0.2, filename_prefix="")


def test_a_prefix_that_names_no_file_is_refused(output):
    write_run(output / "loras" / "run")
    with pytest.raises(ValueError, match="names no file"):
        averaged(load(), filename_prefix="loras/")


def test_folders_below_output_loras_are_offered_newest_first(output):
    for name in ("old", "new/inner", "middle"):
        write_run(output / "loras" / name, count=1, shadows=False)
        stamp = {"old": 1, "middle": 2, "new/inner": 3}[name]
        for file in (output / "loras" / name).iterdir():
            os.utime(file, (stamp, stamp))
    options = BraidLoadCheckpoints.define_schema().inputs[0].options
    assert options == ["new/inner", "middle", "old"]


def test_a_link_to_nothing_among_the_files_takes_no_node_out_of_the_menu(output):
    run = output / "loras" / "run"
    write_run(run, count=2)
    for ending in ("safetensors", "state"):
        (run / f"gone.{ending}").symlink_to(output / "nowhere")
    assert BraidLoadCheckpoints.define_schema().inputs[0].options == ["run"]
    assert BraidCheckpointing.define_schema().inputs[4].options == ["start afresh", "latest"]
    assert "gone" not in BraidLoadCheckpoints.fingerprint_inputs(folder="run", pattern="*")


def test_without_any_run_the_combo_still_has_a_choice(output):
    assert BraidLoadCheckpoints.define_schema().inputs[0].options == [checkpoint_nodes.TOP]


def _prompt(folder, path=""):
    return {
        "1": {
            "class_type": "BraidLoadCheckpoints",
            "inputs": {"folder": folder, "pattern": "*", "path": path},
        },
        "2": {
            "class_type": "BraidPostHocEma",
            "inputs": {
                "checkpoints": ["1", 0],
                "method": "sigma_rel",
                "method.sigma_rel": 0.2,
                **PLAIN,
            },
        },
    }


def test_the_host_accepts_a_folder_that_is_typed_and_not_offered(output, monkeypatch):
    for node in (*NODES, BraidLoadCheckpoints):
        monkeypatch.setitem(core_nodes.NODE_CLASS_MAPPINGS, node.define_schema().node_id, node)
    for folder in ("made/later", str(output / "elsewhere")):
        valid = awaited(execution.validate_prompt("id", _prompt(folder), None))
        assert valid[0], valid


def test_any_folder_may_be_typed_in_either_widget(output):
    write_run(output / "elsewhere", count=2)
    for widgets in (
        {"folder": str(output / "elsewhere")},
        {"folder": ".", "path": str(output / "elsewhere")},
        {"folder": "../elsewhere"},
    ):
        assert [file.step for file in load(**widgets).files] == [100, 200]
    with pytest.raises(ValueError, match="no such folder"):
        load("nowhere")


def test_the_fingerprint_changes_with_the_files_and_only_with_them(output):
    write_run(output / "loras" / "run", count=2)

    def fingerprint(pattern="*"):
        return BraidLoadCheckpoints.fingerprint_inputs(folder="run", pattern=pattern, path="")

    before = fingerprint()
    assert fingerprint() == before
    path = output / "loras" / "run" / "run-step00000100.safetensors"
    os.utime(path, (5, 5))
    touched = fingerprint()
    path.unlink()
    fewer, below = fingerprint(), fingerprint("*/*")
    write_run(output / "loras" / "run" / "part_2", count=1)
    assert len({before, touched, fewer, below, fingerprint("*/*")}) == 5
    assert fingerprint() == fewer  # what the pattern does not name is not looked at
    assert (
        BraidLoadCheckpoints.fingerprint_inputs(folder="nowhere", pattern="*") == "no such folder"
    )


def browser_node(method, **linked):
    """A Post-Hoc EMA node as web/live/graph.js describes it."""
    values = {"method": method.pop("method")} | {f"method.{k}": v for k, v in method.items()}
    return {"node_id": "BraidPostHocEma", "values": values | PLAIN, "inputs": linked}


def test_the_live_chart_has_the_weights_of_a_run_of_the_node(output):
    write_run(output / "loras" / "run")
    source = {"folder": "run", "pattern": "*.safetensors", "path": ""}
    linked = {"node_id": "BraidLoadCheckpoints", "values": source, "inputs": {}}
    for method in METHODS:
        chart = chart_of("ema", browser_node(dict(method), checkpoints=linked))
        report = json.loads(averaged(load(), method)[2])
        assert chart["weights"] == report["weights"] and chart["steps"] == report["steps"]
        json.dumps(chart, allow_nan=False)


def training_of(steps: int, **checkpointing):
    """A Train LoRA node with a log, and behind it Checkpoints and Resume where it is given."""
    linked = {"node_id": "BraidCheckpointing", "values": checkpointing, "inputs": {}}
    log = {
        "node_id": "BraidTrainingLog",
        "values": {},
        "inputs": {"options": linked} if checkpointing else {},
    }
    return {"node_id": "BraidTrainLora", "values": {"steps": steps}, "inputs": {"options": log}}


@pytest.mark.parametrize(
    ("steps", "last", "saved"),
    [(1000, 0, [250, 500, 750, 1000]), (1000, 3, [500, 750, 1000]), (1100, 2, [750, 1000, 1100])],
)
def test_the_live_chart_shows_what_a_linked_training_will_save(steps, last, saved):
    train = training_of(steps, save_every_n_steps=250, save_last_n=last)
    planned = chart_of("ema", browser_node(dict(SIGMA_REL), checkpoints=train))
    assert planned["steps"] == saved and "will save" in planned["note"]


def test_the_live_chart_is_an_example_only_where_nothing_is_linked():
    example = chart_of("ema", browser_node(dict(SIGMA_REL)))
    assert len(example["weights"]) == 10 and "no run is linked" in example["note"]


@pytest.mark.parametrize(
    ("checkpointing", "what_to_set"),
    [
        ({}, "link Checkpoints and Resume to the options of Train LoRA"),
        ({"save_every_n_steps": 0}, "save_every_n_steps is 0; 30 saves about 10 checkpoints"),
        (
            {"save_every_n_steps": 400},
            "save_every_n_steps is 400 of 300 steps; 30 saves about 10 checkpoints",
        ),
    ],
)
def test_linked_to_a_run_that_saves_one_file_the_chart_says_so_and_what_to_set(
    checkpointing, what_to_set
):
    train = training_of(300, **(checkpointing and {"save_last_n": 0, **checkpointing}))
    answer = chart_of("ema", browser_node(dict(SIGMA_REL), checkpoints=train))
    assert answer["message"].startswith("The linked run saves only its finished LoRA")
    assert what_to_set in answer["message"]


def test_the_live_chart_says_what_the_node_would_say(output):
    for method, sentence in (
        ({"method": "sigma_rel", "sigma_rel": 0.4}, "no average"),
        ({"method": "beta", "beta": 2.0}, "between 0.0 and 1.0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            chart_of("ema", browser_node(method))


def test_an_unknown_method_is_refused_and_names_the_known_ones():
    with pytest.raises(ValueError, match="sigma_rel, beta, beta_ramp, sigma_rel_musubi"):
        parse_schedule({"method": "median"})
