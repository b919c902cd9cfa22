"""Nodes on a full disk, through their real writers: one sentence, no half file, no lost work."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import threading
import time

import comfy.model_management
import folder_paths
import pytest
import safetensors.torch
import torch
from comfy_api.latest import io
from fp8_files import write_model
from full_disk import NO_ROOM, files_below, largest_file
from host.awaiting import awaited
from tiny_models import build, conditioning, latent

from comfyui_braid.engine.checkpoints import AdapterStateDict, Checkpoint, Checkpoints
from comfyui_braid.engine.comfyui.fp8.loader import Fp8Request, load_fp8
from comfyui_braid.engine.comfyui.training import run as training_run
from comfyui_braid.engine.comfyui.training.preview import PreviewSampling
from comfyui_braid.engine.disk.writing import NotWrittenError
from comfyui_braid.engine.fp8.policy import Fp8Policy
from comfyui_braid.engine.magcache.presets import preset_named
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.training.options import (
    Checkpointing,
    Preview,
    TrainingLog,
    TrainingOptions,
)
from comfyui_braid.engine.training.states.room import room_needed
from comfyui_braid.engine.training.states.state import read_state
from comfyui_braid.nodes import BraidExtension, outputs, replacements
from comfyui_braid.nodes.ema.nodes import BraidEmaReconstruct, BraidPostHocEma
from comfyui_braid.nodes.fp8 import BraidSaveFp8
from comfyui_braid.nodes.magcache.calibration import BraidMagCacheCalibration
from comfyui_braid.nodes.network import BraidSaveLora
from comfyui_braid.nodes.training import train as training

NOTHING = 300
"""Bytes of a file that fit where no file of ours fits."""
EVERY_STEP = Checkpointing(save_every_n_steps=1, save_state=True)
STEPS = 4


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """ComfyUI's folders below one that is removed."""
    for name in ("output", "temp", "user"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    for node in (training.BraidTrainLora, BraidMagCacheCalibration, BraidEmaReconstruct):
        monkeypatch.setattr(node, "hidden", io.HiddenHolder.from_dict({}))
    return tmp_path


@pytest.fixture
def said(monkeypatch):
    """What Train LoRA shows at the node."""
    texts = []
    monkeypatch.setattr(training.live, "say", lambda node_id, text: texts.append(text))
    return texts


@pytest.fixture
def disk(monkeypatch):
    """`disk[step] = act`: what happens to the disk right after that step, before it is saved."""
    acts = {}
    original = training_run.saved

    def happening(steps):
        for step in steps:
            if step.step in acts:
                acts[step.step]()
            yield step

    monkeypatch.setattr(
        training_run, "saved", lambda steps, *rest: original(happening(steps), *rest)
    )
    with contextlib.ExitStack() as stack:
        acts["fills up"] = lambda size=NOTHING: stack.enter_context(largest_file(size))
        acts["has room"] = stack.close
        yield acts


def train(checkpointing=None, **options):
    widgets = {
        "steps": STEPS,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "seed": 0,
        "output_name": "mine",
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "options": TrainingOptions(checkpointing=checkpointing, **options),
    }
    with torch.inference_mode():
        return training.BraidTrainLora.execute(
            model=[build("flux")],
            latents=[{"samples": latent("flux", 2)}],
            positive=[conditioning("flux")],
            network=[NetworkSpec(rank=4)],
            **{name: [value] for name, value in widgets.items()},
        )


def lora_and_report(output):
    lora, _, _, report = output.result
    return lora, json.loads(report)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def run_files(world):
    return files_below(world / "output" / "loras" / "mine")


def steps_of(world, suffix):
    return [
        int(re.search(r"step(\d+)", name)[1])
        for name in sorted(run_files(world))
        if re.search(rf"-step\d+\{suffix}$", name)
    ]


def test_no_room_at_the_end_leaves_the_lora_at_the_output_and_says_so(world, said, disk):
    whole, _ = lora_and_report(train())
    disk[STEPS] = disk["fills up"]
    output = train(Checkpointing(ema_shadows=True))
    lora, report = lora_and_report(output)
    assert same(lora, whole) and lora.metadata["ss_steps"] == str(STEPS)
    assert "file" not in report
    finished, shadows = report["warnings"]
    assert re.search(rf"finished LoRA could not be saved .*{NO_ROOM}.*Save LoRA", finished)
    assert re.search(rf"EMA shadows could not be saved .*{NO_ROOM}", shadows)
    assert said[-2:] == [finished, shadows]
    assert output.result[2].shadows is None
    assert str(world) not in str(lora.metadata), "no path of this machine goes into files"
    assert files_below(world / "output" / "loras" / "mine_2") == {}
    assert not list((world / "user").rglob("*.*")) and output.ui is None
    disk["has room"]()
    (path,) = BraidSaveLora.execute(lora, "loras/later", "comfyui", "keep").result
    assert same(safetensors.torch.load_file(path), whole)


def test_a_run_goes_on_after_a_checkpoint_without_room_and_saves_the_next(world, said, disk):
    whole, _ = lora_and_report(train())
    disk |= {2: disk["fills up"], 4: disk["has room"]}
    training_folder = world / "output" / "loras" / "mine_2"
    lora, report = lora_and_report(train(EVERY_STEP))
    assert same(lora, whole)
    assert sorted(files_below(training_folder)) == [
        "mine-step00000001.safetensors",
        "mine-step00000001.state",
        "mine-step00000004.safetensors",
        "mine-step00000004.state",
        "mine.safetensors",
    ]
    assert [re.search(r"step (\d) was not saved", text)[1] for text in report["warnings"]] == [
        "2",
        "3",
    ]
    assert all("tries again at the next one" in text for text in report["warnings"])
    assert said == report["warnings"]


def test_a_lora_whose_folder_is_lost_is_saved_in_the_user_folder_and_both_say_where(
    world, said, disk
):
    def lost():
        folder = world / "output" / "loras" / "mine"
        folder.write_bytes(b"as a drive that was unplugged")

    disk[STEPS] = lost
    lora, report = lora_and_report(train())
    spare = world / "user" / "braid_rescued" / "mine" / "mine.safetensors"
    assert report["file"] == str(spare) and f"It is in {spare}" in said[-1]
    assert same(safetensors.torch.load_file(spare), lora)


def cancel(then=lambda: None):
    def act():
        then()
        comfy.model_management.interrupt_current_processing()

    return act


def test_a_cancel_on_a_full_disk_stays_a_cancel_and_says_that_nothing_is_saved(world, said, disk):
    disk[3] = cancel(disk["fills up"])
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train()
    assert re.search(
        rf"cancelled at step 3; saving failed .*{NO_ROOM}.*; nothing is saved$", said[-1]
    )
    assert run_files(world) == {}


def test_a_cancel_on_a_full_disk_names_the_last_step_that_is_saved(world, said, disk):
    disk[3] = cancel(disk["fills up"])
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(EVERY_STEP)
    assert "step 2 is the last saved" in said[-1]
    assert steps_of(world, ".state") == steps_of(world, ".safetensors") == [1, 2]


def test_a_cancel_with_room_for_the_adapter_only_says_that_it_cannot_be_resumed(world, said, disk):
    disk[3] = cancel(lambda: disk["fills up"](400_000))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train()
    assert re.search(
        rf"saved mine-step00000003.safetensors in .*, but no state .*{NO_ROOM}", said[-1]
    )
    assert list(run_files(world)) == ["mine-step00000003.safetensors"]


def test_a_cancel_right_after_a_checkpoint_needs_no_room(world, said, disk, monkeypatch):
    def cancelled(steps, *rest):
        for step in original(steps, *rest):
            if step.step == 2:
                cancel(disk["fills up"])()
            yield step

    original = training_run.saved
    monkeypatch.setattr(training_run, "saved", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(EVERY_STEP)
    assert "it is saved in output/loras/mine" in said[-1] and "resume" in said[-1]
    assert read_state(world / "output/loras/mine/mine-step00000002.state")["run"]["step"] == 2


def test_a_disk_that_is_full_at_the_start_is_refused_in_one_sentence(world, said):
    with largest_file(NOTHING), pytest.raises(ValueError) as refusal:
        train(EVERY_STEP)
    sentence = str(refusal.value)
    assert re.match(
        r"the finished LoRA takes .* KiB, and there is room for 300 bytes in ", sentence
    )
    assert "\n" not in sentence and "Errno" not in sentence
    assert files_below(world) == {} and not (world / "output" / "loras" / "mine").exists()


def test_a_run_whose_states_cannot_fit_says_so_before_its_first_step_and_trains(world, said):
    with largest_file(400_000):
        _, report = lora_and_report(train(EVERY_STEP))
    assert re.match("not every file of this run will be saved: the largest takes about", said[0])
    assert len(report["warnings"]) == 1 + STEPS + 1
    assert steps_of(world, ".state") == [] and "mine.safetensors" in run_files(world)


def test_the_room_that_is_asked_for_is_what_the_files_take(world, said):
    checkpointing = dataclasses.replace(EVERY_STEP, ema_shadows=True)
    _, report = lora_and_report(train(checkpointing))
    needed = room_needed(report["parameters"], checkpointing, STEPS, shadows=5)
    taken = sum(len(data) for data in run_files(world).values())
    last_state = len(run_files(world)[f"mine-step{STEPS:08d}.state"])  # that of the final file too
    assert needed.total == pytest.approx(taken + last_state, rel=0.1)
    assert said == []


def test_previews_and_logs_without_room_are_left_out_of_a_run(world, said, disk, caplog):
    sampling = PreviewSampling(
        latent={"samples": torch.zeros_like(latent("flux"))},
        positive=None,
        negative=None,
        sampler=None,
        sigmas=None,
        steps=1,
        cfg=1.0,
        seed=0,
        vae=None,
    )
    disk |= {1: disk["fills up"], STEPS: disk["has room"]}
    log = TrainingLog(log_with="tensorboard", logging_dir=world / "output" / "logs")
    _, report = lora_and_report(
        train(preview=Preview(every_n_steps=3), preview_sampling=sampling, log=log)
    )
    assert re.search(rf"the preview of step 3 is shown, but not saved .*{NO_ROOM}", caplog.text)
    assert list(run_files(world)) == ["mine.safetensors", "preview/step00000004.png"]


def save_lora(folder):
    BraidSaveLora.execute(AdapterStateDict(LORA, {}), "loras/x", "comfyui", "keep")


def save_average(folder):
    run = Checkpoints(files=(Checkpoint(path=folder / "run" / "run-step1.safetensors", step=1),))
    BraidPostHocEma.execute(run, {"method": "beta", "beta": 0.9}, "step", 1, 0, "factors", "ema/x")


def save_reconstruction(folder):
    shadows = folder / "output" / "loras" / "mine" / "mine-shadows.safetensors"
    BraidEmaReconstruct.execute(Checkpoints(files=(), shadows=shadows), 0.2, "ema/x")


def save_calibration(folder):
    class Measured:
        def result(self):
            return preset_named("FLUX.1-dev")

    BraidMagCacheCalibration.execute(Measured(), {}, "x")


LORA = {
    "diffusion_model.x.lora_up.weight": torch.ones(40, 2),
    "diffusion_model.x.lora_down.weight": torch.ones(2, 40),
}


@pytest.mark.parametrize(
    "save",
    [save_lora, save_average, save_reconstruction, save_calibration],
    ids=lambda f: f.__name__,
)
def test_a_node_that_finds_no_room_says_one_sentence_and_leaves_no_file(save, world):
    (world / "run").mkdir()
    safetensors.torch.save_file(LORA, world / "run" / "run-step1.safetensors", {"ss_steps": "1"})
    if save is save_reconstruction:
        train(Checkpointing(ema_shadows=True))
    before = files_below(world)
    with largest_file(NOTHING), pytest.raises(NotWrittenError) as refusal:
        save(world)
    sentence = str(refusal.value)
    assert re.match(rf"{world}/output/\S+ could not be written: {NO_ROOM} \(it takes ", sentence)
    assert "\n" not in sentence and "Errno" not in sentence
    assert files_below(world) == before
    save(world)  # with room again
    assert len(files_below(world)) > len(before)


def test_an_fp8_model_that_finds_no_room_says_one_sentence_and_leaves_no_file(world, monkeypatch):
    path = write_model(world, monkeypatch)
    with torch.inference_mode():
        model = load_fp8(Fp8Request(path=path, policy=Fp8Policy(granularity="tensor"))).patcher
        before = files_below(world)
        with largest_file(path.stat().st_size // 3), pytest.raises(NotWrittenError) as refusal:
            BraidSaveFp8.execute(model, "diffusion_models/x")
    assert re.search(rf"x_00001_.safetensors could not be written: {NO_ROOM}", str(refusal.value))
    assert files_below(world) == before


def leftover(folder, age_s):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".x.safetensors.{age_s:032x}.partial"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_start_sweeps_what_killed_processes_left_a_day_ago_where_nodes_write(world, monkeypatch):
    monkeypatch.setattr(replacements, "register", lambda: asyncio.sleep(0))  # wants a server
    output, elsewhere = world / "output", world / "another disk"
    (elsewhere / "loras").mkdir(parents=True)
    (output / "loras").symlink_to(elsewhere / "loras")
    old = [
        leftover(folder, 90_000)
        for folder in (
            output / "loras" / "mine",
            output / "diffusion_models",
            output / "magcache",
            output / "anything typed",
            world / "user" / "braid_rescued",
        )
    ]
    young = leftover(output / "loras" / "mine", 80_000)
    foreign = leftover(elsewhere, 90_000)
    awaited(BraidExtension().on_load())
    for thread in threading.enumerate():
        if thread.name == "braid sweep":
            thread.join(60)
    assert not [path for path in old if path.exists()]
    assert young.exists() and foreign.exists()


def test_a_sweep_where_there_is_no_folder_is_silent(world, caplog):
    folder_paths.output_directory = str(world / "nowhere")
    assert outputs.sweep() == [] and caplog.text == ""
