"""Whole runs on tiny real models, told in a line."""

import torch
from tiny_models import build, conditioning, latent

from comfyui_braid.engine.comfyui.training.inputs import TrainingInputs, build_job
from comfyui_braid.engine.comfyui.training.items import pair_items
from comfyui_braid.engine.comfyui.training.run import train_lora
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.engine.training.options import TrainingOptions
from comfyui_braid.engine.training.plan import TrainingPlan

PLAN = TrainingPlan(
    steps=4, batch_size=2, learning_rate=1e-2, seed=3, mixed_precision="no", output_name="tiny"
)


def silent(text):
    pass


def three_items(name):
    latents = [{"samples": latent(name, 1, seed=i)} for i in range(3)]
    return pair_items(latents, [conditioning(name, i) for i in range(3)])


def trained_on(patcher, name, folder, *, say=silent, **given):
    """The outcome of a run on a MODEL, called as the executor does, inside inference mode.

    `given`: plan, network, timesteps, optimizer, options; pairs, held_out, spare_folders.
    """
    options = given.pop("options", TrainingOptions())
    inputs = TrainingInputs(
        patcher=patcher,
        pairs=given.pop("pairs", None) or three_items(name),
        held_out=given.pop("held_out", ()),
        preview_sampling=options.preview_sampling,
        loras=folder,
        spare_folders=given.pop("spare_folders", ()),
    )
    told = {"plan": PLAN, "network": NetworkSpec(rank=4, alpha=4)}
    told["timesteps"] = TimestepSampling(mode="sigmoid")
    with torch.inference_mode():
        return train_lora(build_job(inputs, options=options, **told | given), inputs, say)


def run(name, folder, dtype=torch.float32, **given):
    """The same, on a MODEL built inside inference mode."""
    with torch.inference_mode():
        patcher = build(name, dtype)
    return trained_on(patcher, name, folder, **given)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
