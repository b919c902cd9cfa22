"""Pictures sampled in the middle of a run: they change nothing, and cannot end it."""

import dataclasses
import logging

import comfy.model_management
import comfy.samplers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import conditioning, latent
from training_cases import PLAN, run, same

from comfyui_braid.engine.comfyui.playground import latent_rgb_factors, load_playground_model
from comfyui_braid.engine.comfyui.training import run as training_run
from comfyui_braid.engine.comfyui.training.preview import Previewer, PreviewSampling
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.playground.glyphs import decode, draw_dataset, encode, pictures_of
from comfyui_braid.engine.training.optimizers.optimizer import OptimizerSpec
from comfyui_braid.engine.training.options import Preview, TrainingOptions

SHORT = dataclasses.replace(PLAN, steps=4, batch_size=1)
DROPPING = NetworkSpec(rank=4, alpha=4, neuron_dropout=0.2)


def sampling(name="flux", **changes):
    return PreviewSampling(
        **{
            "latent": {"samples": torch.zeros_like(latent(name))},
            "positive": None,
            "negative": None,
            "sampler": None,
            "sigmas": None,
            "steps": 2,
            "cfg": 1.0,
            "seed": 5,
            "vae": None,
            **changes,
        }
    )


def options(**changes):
    return TrainingOptions(preview=Preview(every_n_steps=2), preview_sampling=sampling(**changes))


class TinyVae:
    """Decodes like a VAE node: (B, H, W, 3)."""

    def decode(self, latents):
        return latents[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamWScheduleFree"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_run_with_previews_is_bit_for_bit_the_run_without(checkpointing, optimizer, tmp_path):
    if optimizer == "AdamWScheduleFree":
        pytest.importorskip("schedulefree")
    plan = dataclasses.replace(SHORT, gradient_checkpointing=checkpointing)
    same_run = {
        "plan": plan,
        "network": DROPPING,
        "optimizer": OptimizerSpec(optimizer_type=optimizer),
    }
    without = run("flux", tmp_path, **same_run)
    guided = options(
        negative=conditioning("flux", 1),
        cfg=2.0,
        sampler=comfy.samplers.sampler_object("euler_ancestral"),
        sigmas=torch.tensor([1.0, 0.5, 0.0]),
        vae=TinyVae(),
    )
    random_state = torch.random.get_rng_state()
    with_previews = run("flux", tmp_path, options=guided, **same_run)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert same(with_previews.lora, without.lora)
    assert with_previews.loss_map["loss"] == without.loss_map["loss"]
    pictures = sorted((tmp_path / "tiny_2" / "preview").iterdir())
    assert [path.name for path in pictures] == ["step00000002.png", "step00000004.png"]
    first, second = (np.asarray(Image.open(path)) for path in pictures)
    assert first.shape == (128, 128, 3) and not np.array_equal(first, second)


def test_a_preview_shows_the_adapter_as_it_is_and_the_same_seed_the_same_noise(tmp_path):
    plan = dataclasses.replace(SHORT, steps=2, learning_rate=1e-9)
    options_ = TrainingOptions(preview=Preview(every_n_steps=1), preview_sampling=sampling())
    run("flux", tmp_path, plan=plan, options=options_)
    still = [np.asarray(Image.open(p), int) for p in sorted(tmp_path.rglob("*.png"))]
    assert np.abs(still[0] - still[1]).max() <= 1
    run("flux", tmp_path, plan=dataclasses.replace(plan, learning_rate=0.1), options=options_)
    moved = [np.asarray(Image.open(p), int) for p in sorted((tmp_path / "tiny_2").rglob("*.png"))]
    assert np.abs(moved[0] - moved[1]).max() > 1


@pytest.mark.parametrize(
    "error, text",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "RuntimeError (mat1 and mat2"),
    ],
)
def test_a_preview_that_fails_is_skipped_with_a_warning_and_the_run_goes_on(
    error, text, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(comfy.model_management, "OOM_EXCEPTION", torch.OutOfMemoryError)

    class Broken:
        def decode(self, latents):
            raise error

    without = run("flux", tmp_path, plan=SHORT)
    with caplog.at_level(logging.WARNING, "comfyui_braid"):
        trained = run("flux", tmp_path, plan=SHORT, options=options(vae=Broken()))
    assert caplog.text.count("no preview at step") == 2 and text in caplog.text
    assert same(trained.lora, without.lora)
    assert not list(tmp_path.rglob("*.png"))


def test_cancelling_during_a_preview_is_no_failed_preview(tmp_path):
    class Cancelled:
        def decode(self, latents):
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run("flux", tmp_path, plan=SHORT, options=options(vae=Cancelled()))
    assert [p.name for p in tmp_path.rglob("*.safetensors")] == ["tiny-step00000002.safetensors"]


def test_the_live_picture_shows_the_last_sample_beside_the_loss_curve(tmp_path, monkeypatch):
    pictures = []
    original = training_run.reported

    def shown(steps, total, picture):
        for step in original(steps, total, picture):
            pictures.append(picture(step))
            yield step

    monkeypatch.setattr(training_run, "reported", shown)
    run("flux", tmp_path, plan=SHORT, options=options())
    drawn = [picture for picture in pictures if picture is not None]
    assert drawn[0].shape[1] < drawn[-1].shape[1]  # a second panel from the first sample on
    assert pictures[-1] is not None  # the last step is always drawn


def test_playground_previews_have_the_true_colours_of_its_pictures():
    patcher = load_playground_model()
    assert patcher.model.latent_format.latent_rgb_factors == latent_rgb_factors()
    pictures = pictures_of(draw_dataset(4, "outlined", seed=3))
    latents = encode(pictures)
    preview = Previewer.__new__(Previewer)
    preview._sampling, preview._patcher = sampling(), patcher
    shown = preview._pictures(latents)
    cells = decode(latents).reshape(4, 16, 2, 16, 2, 3).mean(dim=(2, 4))
    torch.testing.assert_close(shown, cells, rtol=1e-4, atol=1e-4)
