"""EMA shadows kept by a run: exact, resumable, rebuilt from the file beside the final one."""

import dataclasses

import comfy.model_management
import pytest
import safetensors.torch
import torch
from tiny_models import build
from training_cases import PLAN, run, same, trained_on

from comfyui_braid.engine.checkpoints import SHADOWS_SUFFIX
from comfyui_braid.engine.comfyui.training import run as training_run
from comfyui_braid.engine.ema.profile import gamma_from_sigma_rel, power_beta
from comfyui_braid.engine.ema.reconstruction import (
    plan_reconstruction,
    read_shadows_info,
    reconstructed,
)
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.training.optimizers.optimizer import OptimizerSpec
from comfyui_braid.engine.training.options import Checkpointing, TrainingOptions

LONG = dataclasses.replace(PLAN, steps=23, batch_size=1)


def options(**changes):
    kept = {"save_every_n_steps": 1, "save_state": True, "ema_shadows": True, **changes}
    return TrainingOptions(checkpointing=Checkpointing(**kept))


def shadows_of(trained):
    return safetensors.torch.load_file(trained.checkpoints.shadows)


@pytest.mark.parametrize("split_qkv", [False, True])
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamWScheduleFree"])
def test_the_shadows_are_the_power_averages_of_the_checkpoints_they_saw(
    optimizer, split_qkv, tmp_path
):
    if optimizer == "AdamWScheduleFree":
        pytest.importorskip("schedulefree")
    spec = OptimizerSpec(optimizer_type=optimizer)
    network = NetworkSpec(rank=4, alpha=4, split_qkv=split_qkv)
    given = {"plan": LONG, "options": options(), "optimizer": spec, "network": network}
    trained = run("flux", tmp_path, **given)
    info = read_shadows_info(trained.checkpoints.shadows)
    assert info.step == 23
    assert trained.checkpoints.shadows.name == f"tiny{SHADOWS_SUFFIX}"
    files = {
        file.step: safetensors.torch.load_file(file.path) for file in trained.checkpoints.files
    }
    stored = shadows_of(trained)
    keys = [key for key in files[23] if not key.endswith(".alpha")]
    for sigma_rel in info.sigma_rels:
        gamma = gamma_from_sigma_rel(sigma_rel)
        expected = {key: torch.zeros_like(files[23][key]) for key in keys}
        for before, step in ((0, 10), (10, 20), (20, 23)):
            beta = power_beta(gamma, step, step - before)
            for key in keys:
                expected[key].lerp_(files[step][key], 1 - beta)
        for key in keys:
            torch.testing.assert_close(stored[f"{sigma_rel}/{key}"], expected[key])


@pytest.mark.parametrize("split_qkv", [False, True])
def test_any_width_can_be_rebuilt_into_an_adapter_with_the_same_keys(split_qkv, tmp_path):
    network = NetworkSpec(rank=4, alpha=4, split_qkv=split_qkv)
    shadows = options(save_every_n_steps=0)
    trained = run("flux", tmp_path, plan=LONG, options=shadows, network=network)
    plan = plan_reconstruction(trained.checkpoints, 0.1)
    steps = reconstructed(trained.checkpoints, plan)
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        rebuilt = stop.value
    assert {k: t.shape for k, t in rebuilt.items()} == {k: t.shape for k, t in trained.lora.items()}


def test_shadows_of_a_run_that_was_cancelled_and_resumed_equal_those_of_the_whole_one(
    tmp_path, monkeypatch
):
    few = options(save_every_n_steps=0)
    whole = run("flux", tmp_path / "whole", plan=LONG, options=few)
    original = training_run.saved

    def cancelled_after_thirteen_steps(steps, *rest):
        for step in original(steps, *rest):
            if step.step == 13:  # between two updates
                comfy.model_management.interrupt_current_processing()
            yield step

    monkeypatch.setattr(training_run, "saved", cancelled_after_thirteen_steps)
    with (
        torch.inference_mode(),
        pytest.raises(comfy.model_management.InterruptProcessingException),
    ):
        trained_on(build("flux"), "flux", tmp_path / "part", plan=LONG, options=few)
    monkeypatch.undo()
    going_on = options(save_every_n_steps=0, resume="latest")
    resumed = run("flux", tmp_path / "part", plan=LONG, options=going_on)
    assert same(resumed.lora, whole.lora)
    assert same(shadows_of(resumed), shadows_of(whole))


def test_a_resume_that_would_start_shadows_in_mid_run_is_refused(tmp_path):
    short = dataclasses.replace(PLAN, steps=2)
    run("flux", tmp_path, plan=short, options=options(ema_shadows=False))
    with pytest.raises(ValueError, match="ema_shadows False, this run has True"):
        run("flux", tmp_path, options=options(resume="latest"))


def test_training_is_the_same_with_and_without_shadows(tmp_path):
    plan = dataclasses.replace(PLAN, steps=2)
    with_shadows = run("flux", tmp_path, plan=plan, options=options())
    without = run("flux", tmp_path, plan=plan)
    assert same(with_shadows.lora, without.lora)
    assert without.checkpoints.shadows is None
