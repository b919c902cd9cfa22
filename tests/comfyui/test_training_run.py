"""Whole runs through the node's own path, on tiny real models inside ComfyUI."""

import dataclasses
import json

import comfy.lora
import comfy.model_management
import comfy.sample
import pytest
import safetensors
import safetensors.torch
import torch
from tiny_models import ARCHITECTURES, build, conditioning, latent, sampled
from training_cases import PLAN, run, same, trained_on

from comfyui_braid.engine.comfyui.training import run as training_run
from comfyui_braid.engine.comfyui.training.items import pair_items
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.training.optimizers.optimizer import OptimizerSpec
from comfyui_braid.engine.training.options import Checkpointing, TrainingOptions, Validation
from comfyui_braid.engine.training.validation import Validator


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_trains_saves_and_leaves_the_model_as_it_was(name, dtype, checkpointing, tmp_path):
    plan = dataclasses.replace(PLAN, gradient_checkpointing=checkpointing)
    patcher = build(name, dtype)
    before = sampled(patcher, name)
    with torch.inference_mode():
        trained = trained_on(patcher, name, tmp_path, plan=plan)
    assert torch.equal(sampled(patcher, name), before)
    assert len(trained.loss_map["loss"]) == PLAN.steps
    up = [value for key, value in trained.lora.items() if "lora_B" in key or "lora_up" in key]
    assert up and all(value.abs().sum() > 0 for value in up[: len(up) // 2])
    path = tmp_path / "tiny" / "tiny.safetensors"
    assert same(safetensors.torch.load_file(path), trained.lora)
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    loaded = comfy.lora.load_lora(trained.lora, keys)
    assert len(loaded) == trained.report["modules"]


def test_a_batch_has_its_size_whatever_the_lengths_of_its_prompts(tmp_path):
    """Four items, two lengths: each step trains on all four, in two calls of the network."""
    latents = [{"samples": latent("qwen_image", 1, seed=i)} for i in range(4)]
    positive = [conditioning("qwen_image", i, tokens=(6, 9)[i % 2]) for i in range(4)]
    plan = dataclasses.replace(PLAN, batch_size=4)
    trained = run("qwen_image", tmp_path, plan=plan, pairs=pair_items(latents, positive))
    assert len(trained.loss_map["timesteps"]) == 4 * PLAN.steps
    assert trained.report["forward_calls_per_step"] == 2
    assert trained.resolved.batches_per_epoch == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_runs_with_one_seed_give_the_same_bytes(name, tmp_path):
    first, second = run(name, tmp_path), run(name, tmp_path)
    assert same(first.lora, second.lora)
    assert first.loss_map["loss"] == second.loss_map["loss"]
    assert (tmp_path / "tiny_2" / "tiny.safetensors").exists()


@pytest.mark.parametrize("split_qkv", [False, True])
def test_cancel_saves_adapter_and_state_and_the_resumed_run_equals_the_whole_one(
    split_qkv, tmp_path, monkeypatch
):
    network = NetworkSpec(rank=4, alpha=4, split_qkv=split_qkv)
    options = TrainingOptions(checkpointing=Checkpointing(save_every_n_steps=2, save_state=True))
    plan = dataclasses.replace(PLAN, steps=7)
    given = {"plan": plan, "network": network}
    whole = run("flux", tmp_path / "whole", options=options, **given)
    matrices = (t for key, t in whole.lora.items() if not key.endswith(".alpha"))
    assert whole.resolved.filed_parameters == sum(t.numel() for t in matrices)
    said = []
    patcher = build("flux")
    original = training_run.saved

    def cancelled_after_three_steps(steps, *rest):
        for step in original(steps, *rest):
            if step.step == 3:
                comfy.model_management.interrupt_current_processing()
            yield step

    monkeypatch.setattr(training_run, "saved", cancelled_after_three_steps)
    with (
        torch.inference_mode(),
        pytest.raises(comfy.model_management.InterruptProcessingException),
    ):
        trained_on(patcher, "flux", tmp_path / "part", options=options, say=said.append, **given)
    monkeypatch.undo()
    assert "saved" in said[-1]
    resume = TrainingOptions(
        checkpointing=Checkpointing(save_every_n_steps=2, save_state=True, resume="latest")
    )
    resumed = run("flux", tmp_path / "part", options=resume, **given)
    assert same(resumed.lora, whole.lora)
    assert resumed.loss_map["loss"] == whole.loss_map["loss"]
    assert resumed.loss_map["timesteps"] == whole.loss_map["timesteps"]


@pytest.mark.parametrize("stopped_at", [2, 4], ids=["in the middle", "after the last step"])
def test_a_run_cancelled_while_it_measures_held_out_loss_goes_on_as_if_it_had_not_been(
    stopped_at, tmp_path, monkeypatch
):
    held_out = pair_items([{"samples": latent("flux", 1, seed=9)}], [conditioning("flux", 9)])
    options = TrainingOptions(
        checkpointing=Checkpointing(resume="latest"),
        validation=Validation(every_n_steps=2, timesteps_per_item=2),
    )
    whole = run("flux", tmp_path / "whole", options=options, held_out=held_out)
    measure = Validator.measure

    def cancelled(self, run):
        if run.step == stopped_at:
            raise comfy.model_management.InterruptProcessingException
        return measure(self, run)

    monkeypatch.setattr(Validator, "measure", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run("flux", tmp_path / "part", options=options, held_out=held_out)
    monkeypatch.undo()
    part = run("flux", tmp_path / "part", options=options, held_out=held_out)
    assert same(part.lora, whole.lora)
    assert repr(part.loss_map) == repr(whole.loss_map)  # NaN of an empty bin equals NaN
    assert json.loads(json.dumps(part.report, allow_nan=False))["steps_done"] == PLAN.steps


def test_held_out_loss_is_measured_and_marks_the_best_checkpoint(tmp_path):
    held_out = pair_items([{"samples": latent("flux", 1, seed=9)}], [conditioning("flux", 9)])
    options = TrainingOptions(
        checkpointing=Checkpointing(save_every_n_steps=1, save_last_n=1),
        validation=Validation(every_n_steps=1, timesteps_per_item=2),
    )
    trained = run("flux", tmp_path, options=options, held_out=held_out)
    losses = trained.loss_map["validation_loss"]
    assert len(losses) == PLAN.steps
    best = losses.index(min(losses)) + 1
    kept = {file.step: file.path for file in trained.checkpoints.files}
    assert set(kept) == {best, PLAN.steps}
    with safetensors.safe_open(kept[best], "pt") as file:
        assert file.metadata()["braid_best_so_far"] == "true"


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"network": NetworkSpec(rank=8, alpha=8)}, "network"),
        (
            {"network": NetworkSpec(rank=4, alpha=4, split_qkv=True)},
            "saved with network.split_qkv False, this run has True",
        ),
        ({"plan": dataclasses.replace(PLAN, steps=9, seed=4)}, "seed"),
        ({"optimizer": OptimizerSpec(optimizer_type="SGD")}, "optimizer"),
        (
            {"optimizer": OptimizerSpec(lr_scheduler="linear", lr_warmup_steps=2)},
            "lr_scheduler constant, this run has linear",
        ),
    ],
)
def test_resuming_another_run_is_refused_by_the_name_of_what_differs(change, sentence, tmp_path):
    options = TrainingOptions(checkpointing=Checkpointing(save_state=True))
    run("flux", tmp_path, options=options)
    resume = TrainingOptions(checkpointing=Checkpointing(resume="latest"))
    longer = {"plan": dataclasses.replace(PLAN, steps=9), **change}
    with pytest.raises(ValueError, match=sentence):
        run("flux", tmp_path, options=resume, **longer)


def test_resuming_with_another_warm_up_is_refused(tmp_path):
    options = TrainingOptions(checkpointing=Checkpointing(save_state=True))
    warm = OptimizerSpec(lr_scheduler="linear", lr_warmup_steps=2)
    run("flux", tmp_path, options=options, optimizer=warm)
    resume = TrainingOptions(checkpointing=Checkpointing(resume="latest"))
    longer = {"plan": dataclasses.replace(PLAN, steps=9), "options": resume}
    with pytest.raises(ValueError, match="lr_warmup_steps 2, this run has 3"):
        run("flux", tmp_path, optimizer=dataclasses.replace(warm, lr_warmup_steps=3), **longer)


def test_latents_and_conditioning_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 latents but 2 conditionings"):
        pair_items(
            [{"samples": torch.zeros(1, 16, 4, 4)}] * 3,
            [conditioning("flux", 0), conditioning("flux", 1)],
        )


def test_core_s_bucket_lists_and_shared_conditioning_are_understood():
    entries = [conditioning("flux", i)[0] for i in range(5)]
    bucketed = pair_items(
        [{"samples": torch.zeros(2, 16, 4, 4)}, {"samples": torch.zeros(3, 16, 8, 4)}],
        [entries[:2], entries[2:]],
    )
    assert [tuple(samples.shape) for samples, _ in bucketed] == [(1, 16, 4, 4)] * 2 + [
        (1, 16, 8, 4)
    ] * 3
    assert [positive[0] is entry for (_, positive), entry in zip(bucketed, entries, strict=True)]
    shared = pair_items([{"samples": torch.zeros(4, 16, 4, 4)}], [conditioning("flux", 0)])
    assert len(shared) == 4


def test_an_unwritable_output_is_refused_before_training(tmp_path):
    (tmp_path / "tiny").write_text("a file where the folder should be")
    with pytest.raises((ValueError, OSError), match="tiny"):
        run("flux", tmp_path)
