"""Small real runs of the training loop: a random FLUX in plain torch with adapters on it."""

import math

import torch

from comfyui_braid.engine.network.architectures import architecture_of
from comfyui_braid.engine.network.attach import attached, build_network, parameter_groups
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.network.targets import select_targets
from comfyui_braid.engine.playground.denoiser import PlaygroundDenoiser
from comfyui_braid.engine.playground.glyphs import draw_dataset, encode, pictures_of
from comfyui_braid.engine.playground.model import Flux, FluxShape
from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.engine.timesteps.stream import TimestepStream
from comfyui_braid.engine.training.dataset import Dataset, TrainingItem
from comfyui_braid.engine.training.loop import TrainingRun
from comfyui_braid.engine.training.optimizers.optimizer import Optimization, OptimizerSpec
from comfyui_braid.engine.training.plan import TrainingPlan

PLAN = TrainingPlan(steps=6, batch_size=2, learning_rate=1e-3, seed=7, mixed_precision="no")


def make_run(plan=PLAN, spec=None, optimizer=None, sampling=None, dropout=0.1, tall=()):
    """(run, model): the same for the same arguments. `tall`: items of another shape."""
    torch.manual_seed(0)
    model = Flux(FluxShape(depth=1, depth_single_blocks=1)).requires_grad_(False)
    spec = spec or NetworkSpec(rank=4, alpha=4, neuron_dropout=dropout)
    report = select_targets(model, spec, architecture_of({"image_model": "flux"}))
    network = build_network(report.selected, spec, seed=plan.seed)
    glyphs = draw_dataset(5, "outlined", seed=1)
    latents = encode(pictures_of(glyphs))[:, :, 4:12, 4:12]
    latents = [x[:, :, :4] if i in tall else x for i, x in enumerate(latents)]
    items = [
        TrainingItem(latents=latent, conditioning=g.caption, batch_key=latent.shape)
        for latent, g in zip(latents, glyphs, strict=True)
    ]
    run = TrainingRun(
        plan=plan,
        dataset=Dataset(items),
        denoiser=PlaygroundDenoiser(model),
        network=network,
        timesteps=TimestepStream(
            sampling or TimestepSampling(mode="sigmoid", num_timestep_buckets=3), 5, plan.seed
        ),
        optimization=Optimization(
            optimizer or OptimizerSpec(lr_scheduler="cosine", lr_warmup_steps=2),
            parameter_groups(network, plan.learning_rate),
            plan.steps,
        ),
        device=torch.device("cpu"),
    )
    return run, model


def train(run, model, until=math.inf):
    with attached(model, run.network):
        for step in run.steps():
            if step.step >= until:
                break
    return {k: v.clone() for k, v in run.network.state_dict().items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
