"""What goes wrong around a run, as its user meets it: a clear sentence, and nothing lost."""

import dataclasses
import logging
import math
from pathlib import Path

import comfy.model_management
import comfy.nested_tensor
import pytest
import safetensors
import safetensors.torch
import torch
from denoiser_cases import build_fp8
from tiny_models import build, conditioning, latent
from training_cases import PLAN, run, same, trained_on

from comfyui_braid.engine.comfyui.differentiable.denoiser import ComfyDenoiser
from comfyui_braid.engine.comfyui.playground import load_playground_model
from comfyui_braid.engine.comfyui.training.items import pair_items
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.playground.model import WEIGHTS
from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.engine.training.loop import TrainingDiverged, TrainingRun
from comfyui_braid.engine.training.options import (
    Checkpointing,
    TrainingLog,
    TrainingOptions,
    Validation,
)

SHORT = dataclasses.replace(PLAN, steps=3, batch_size=1)
SAVING = TrainingOptions(checkpointing=Checkpointing(save_every_n_steps=1, save_state=True))
VALIDATING = TrainingOptions(validation=Validation(every_n_steps=1))
RESUMING = TrainingOptions(checkpointing=Checkpointing(save_state=True, resume="latest"))


def test_a_diverged_run_saves_its_last_finite_adapter_and_says_why_it_stopped(
    tmp_path, monkeypatch
):
    original, calls = ComfyDenoiser.target, []

    def broken(self, latents, noise, t):
        calls.append(t)
        return original(self, latents, noise, t) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(ComfyDenoiser, "target", broken)
    with pytest.raises(TrainingDiverged, match="became nan at step 3.*lower learning_rate"):
        run("flux", tmp_path, plan=SHORT)
    saved = tmp_path / "tiny" / "tiny-step00000002.safetensors"
    assert all(torch.isfinite(t).all() for t in safetensors.torch.load_file(saved).values())
    assert saved.with_suffix(".state").exists()


WRONG_ENCODER = [[torch.zeros(1, 6, 32), {"pooled_output": torch.zeros(1, 32)}]]
TWO_PROMPTS = [[torch.zeros(2, 6, 64), {"pooled_output": torch.zeros(2, 32)}]]


def pairs_with(positive, size=16):
    """Two good items, and one with this conditioning and a latent of this height."""
    latents = [{"samples": latent("flux", 1, seed=i)} for i in range(3)]
    latents[2]["samples"] = latents[2]["samples"][:, :, :size]
    return pair_items(latents, [conditioning("flux", 0), conditioning("flux", 1), positive])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"pairs": pairs_with(WRONG_ENCODER)}, "c_crossattn 32 wide.*text encoder that belongs"),
        ({"pairs": pairs_with(TWO_PROMPTS)}, "its conditioning is a batch of 2"),
        (
            {
                "pairs": pairs_with(conditioning("flux"), size=2),
                "timesteps": TimestepSampling(
                    mode="flux_shift", min_timestep=999, preserve_distribution_shape=True
                ),
            },
            "min_timestep 999 to max_timestep 1000 holds",
        ),
        (
            {
                "plan": dataclasses.replace(SHORT, scale_weight_norms=1.0),
                "network": NetworkSpec(kind="loha"),
            },
            "scale_weight_norms=1.0: works on lora only, not on loha",
        ),
        ({"held_out": pairs_with(WRONG_ENCODER), "options": VALIDATING}, "32 wide"),
    ],
    ids=["text encoder", "batch of prompts", "range", "norms", "held out"],
)
def test_what_cannot_be_trained_is_said_before_the_first_step_and_leaves_no_folder(
    changes, sentence, tmp_path, monkeypatch
):
    monkeypatch.setattr(TrainingRun, "_train_one_step", None)
    with pytest.raises(ValueError, match=sentence):
        run("flux", tmp_path, **{"plan": SHORT} | changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_and_prompts_that_hold_no_numbers_are_refused_by_their_place(value):
    good, bad = latent("flux"), latent("flux").fill_(value)
    with pytest.raises(ValueError, match="latents: item 2 holds NaN or infinite values"):
        pair_items([{"samples": good}, {"samples": bad}], [conditioning("flux")])
    broken = [[torch.full((1, 6, 64), value), {}]]
    with pytest.raises(ValueError, match="positive: item 2 holds NaN"):
        pair_items([{"samples": good}] * 2, [conditioning("flux"), broken])


def test_latents_of_several_streams_are_refused():
    packed = comfy.nested_tensor.NestedTensor((latent("flux"), latent("flux")))
    with pytest.raises(ValueError, match="several streams"):
        pair_items([{"samples": packed}], [conditioning("flux")])


def test_a_noise_mask_is_not_used_and_that_is_said(caplog):
    latents = [{"samples": latent("flux", 2), "noise_mask": torch.zeros(1, 16, 16)}]
    assert len(pair_items(latents, [conditioning("flux")])) == 2
    assert "noise mask: it is not used" in caplog.text


def changed_pairs(what):
    latents = [{"samples": latent("flux", 1, seed=i)} for i in range(3)]
    positive = [conditioning("flux", i) for i in range(3)]
    match what:
        case "picture":
            latents[1] = {"samples": latents[1]["samples"] + 1e-6}
        case "prompt":
            positive[1] = conditioning("flux", 9)
        case "order":
            latents.reverse()
        case "one more":
            latents.append(latents[0])
            positive.append(positive[0])
    return pair_items(latents, positive)


@pytest.mark.parametrize("what", ["picture", "prompt", "order", "one more"])
def test_resuming_with_a_changed_dataset_is_refused(what, tmp_path):
    run("flux", tmp_path, plan=dataclasses.replace(SHORT, steps=1), options=SAVING)
    with pytest.raises(ValueError, match="saved with data .* this run has .*start afresh"):
        run("flux", tmp_path, plan=SHORT, options=RESUMING, pairs=changed_pairs(what))
    run("flux", tmp_path, plan=SHORT, options=RESUMING, pairs=changed_pairs("nothing"))


def test_resuming_on_another_architecture_is_refused(tmp_path):
    run("flux", tmp_path, plan=dataclasses.replace(SHORT, steps=1), options=SAVING)
    with pytest.raises(ValueError, match="saved with architecture .*FLUX.* this run has"):
        run("qwen_image", tmp_path, plan=SHORT, options=RESUMING)


def test_resume_latest_without_a_state_starts_afresh_and_a_longer_run_goes_on(tmp_path):
    first = run("flux", tmp_path, plan=SHORT, options=RESUMING)
    assert first.report["steps_done"] == 3
    with pytest.raises(ValueError, match="already at step 3 of 3; raise steps"):
        run("flux", tmp_path, plan=SHORT, options=RESUMING)
    longer = dataclasses.replace(SHORT, steps=4)
    further = run("flux", tmp_path, plan=longer, options=RESUMING)
    assert same(further.lora, run("flux", tmp_path / "whole", plan=longer).lora)
    assert (tmp_path / "tiny" / "tiny-step00000004.state").exists()


def test_a_missing_log_package_is_said_before_the_first_step(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = TrainingLog(log_with="tensorboard", logging_dir=tmp_path / "logs")
    with pytest.raises(ValueError, match="pip install tensorboard"):
        run("flux", tmp_path, plan=SHORT, options=TrainingOptions(log=log))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder without files")
def test_a_read_only_output_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(TrainingRun, "_train_one_step", None)
    with pytest.raises(ValueError, match="cannot be saved under /sys/kernel/.*not be written"):
        run("flux", Path("/sys/kernel/braid"), plan=SHORT)


def test_files_hold_the_whole_configuration_and_no_path_of_this_machine(tmp_path):
    trained = run("flux", tmp_path, plan=SHORT, options=SAVING)
    for path in sorted((tmp_path / "tiny").glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert str(tmp_path) not in str(metadata)
        for key in ("ss_steps", "ss_epoch", "braid_loss", "braid_config", "sshs_model_hash"):
            assert metadata[key], key
        assert '"data": "' in metadata["braid_config"]
        assert metadata["ss_optimizer"] == "torch.optim.adamw.AdamW"
    assert trained.report["folder"] == str(tmp_path / "tiny")
    assert trained.report["compiled"] == "no" and trained.report["seconds_per_step"] > 0


OF_MUSUBI = (
    "session_id training_started_at training_finished_at output_name learning_rate num_train_items "
    "num_batches_per_epoch num_epochs gradient_checkpointing gradient_accumulation_steps "
    "gradient_checkpointing_cpu_offload max_train_steps lr_warmup_steps lr_scheduler "
    "base_model_version network_module network_dim network_alpha network_dropout mixed_precision "
    "seed training_comment optimizer max_grad_norm fp8_base full_fp16 full_bf16 weighting_scheme "
    "logit_mean logit_std mode_scale guidance_scale timestep_sampling sigmoid_scale "
    "discrete_flow_shift datasets steps epoch"
).split()
"""What musubi-tuner 30c658c writes into every adapter, without the `ss_`."""


def test_files_hold_every_field_that_musubi_writes_and_the_name_of_the_base_file(tmp_path):
    with torch.inference_mode():
        plain = trained_on(build("flux"), "flux", tmp_path, plan=SHORT)
        loaded = trained_on(load_playground_model(), "flux", tmp_path, plan=SHORT)
        fp8 = trained_on(build_fp8("flux"), "flux", tmp_path, plan=SHORT)
    assert {f"ss_{name}" for name in OF_MUSUBI} <= set(plain.lora.metadata)
    assert plain.lora.metadata["ss_fp8_base"] == "False"
    assert fp8.lora.metadata["ss_fp8_base"] == "True"
    assert "ss_sd_model_name" not in plain.lora.metadata
    assert loaded.lora.metadata["ss_sd_model_name"] == WEIGHTS.name
    assert plain.lora.metadata["ss_session_id"] != loaded.lora.metadata["ss_session_id"]


def test_nothing_is_said_where_nothing_happened(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "comfyui_braid"), torch.inference_mode():
        trained_on(build("flux"), "flux", tmp_path, plan=SHORT)
    assert caplog.text == ""
