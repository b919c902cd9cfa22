"""Training a LoRA on an FP8 base, through the trainer itself."""

import dataclasses

import pytest
import torch
from fp8_files import distance, reference, write_model
from tiny_models import conditioning, latent

from comfyui_braid.engine.comfyui.differentiable.frozen import frozen
from comfyui_braid.engine.comfyui.fp8.loader import Fp8Request, load_fp8
from comfyui_braid.engine.comfyui.training.items import pair_items
from comfyui_braid.engine.comfyui.training.run import LoraTraining, train_lora
from comfyui_braid.engine.fp8.policy import Fp8Policy
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.engine.training.optimizer import OptimizerSpec
from comfyui_braid.engine.training.options import TrainingOptions
from comfyui_braid.engine.training.plan import TrainingPlan

PLAN = TrainingPlan(steps=8, batch_size=2, learning_rate=2e-3, seed=3, mixed_precision="bf16")
GRANULARITIES = ("tensor", "channel", "block")


def load(path, granularity):
    with torch.inference_mode():
        request = Fp8Request(path=path, policy=Fp8Policy(granularity=granularity))
        return load_fp8(request).patcher


def train(patcher, name, folder, checkpointing=False):
    latents = [{"samples": latent(name, 1, seed=i)} for i in range(3)]
    run = LoraTraining(
        plan=dataclasses.replace(PLAN, gradient_checkpointing=checkpointing),
        network=NetworkSpec(rank=4, alpha=4),
        timesteps=TimestepSampling(mode="sigmoid"),
        optimizer=OptimizerSpec(),
        options=TrainingOptions(),
        pairs=pair_items(latents, [conditioning(name, i) for i in range(3)]),
        held_out=(),
        loras=folder,
    )
    with torch.inference_mode():
        return train_lora(patcher, run, lambda text: None)


def weights(patcher):
    state = patcher.model.diffusion_model.state_dict()
    return {key: tensor.flatten().view(torch.uint8).clone() for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("flux", "tensor"), ("flux", "channel"), ("flux", "block"), ("wan", "block")],
)
def test_the_loss_curve_on_fp8_lies_on_the_one_on_bf16(name, granularity, tmp_path, monkeypatch):
    path = write_model(tmp_path, monkeypatch, name)
    exact = torch.tensor(train(reference(path), name, tmp_path / "bf16").loss_map["loss"])
    patcher = load(path, granularity)
    before = weights(patcher)
    trained = train(patcher, name, tmp_path / "fp8", checkpointing=granularity == "block")
    losses = torch.tensor(trained.loss_map["loss"])
    assert distance(losses, exact) < 0.005
    assert (losses - exact).abs().max() < 0.3 * (exact.max() - exact.min())
    after = weights(patcher)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_backward_keeps_no_weight_and_gives_the_gradient_of_the_dequantised_one(
    granularity, tmp_path, monkeypatch
):
    patcher = load(write_model(tmp_path, monkeypatch), granularity)
    linear = patcher.model.diffusion_model.get_submodule("single_blocks.0.linear1")
    with torch.inference_mode():
        dense = linear.weight.dequantize()
    dense = dense.clone()
    x = torch.randn(6, 128, requires_grad=True)
    kept = []
    with frozen(patcher.model):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = linear(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not kept
    assert torch.allclose(grad, torch.ones_like(y) @ dense, atol=1e-4)
