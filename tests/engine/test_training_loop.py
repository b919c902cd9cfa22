"""The loop on a small random FLUX in plain torch, with real adapters, files and resumes."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
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
from comfyui_braid.engine.training.loop import TrainingDiverged, TrainingRun
from comfyui_braid.engine.training.optimizer import Optimization, OptimizerSpec
from comfyui_braid.engine.training.plan import TrainingPlan

PLAN = TrainingPlan(steps=6, batch_size=2, learning_rate=1e-3, seed=7, mixed_precision="no")


def make_run(plan=PLAN, spec=None, optimizer=None, sampling=None, dropout=0.1):
    """(run, model): the same for the same arguments."""
    torch.manual_seed(0)
    model = Flux(FluxShape(depth=1, depth_single_blocks=1)).requires_grad_(False)
    spec = spec or NetworkSpec(rank=4, alpha=4, neuron_dropout=dropout)
    report = select_targets(model, spec, architecture_of({"image_model": "flux"}))
    network = build_network(report.selected, spec, seed=plan.seed)
    glyphs = draw_dataset(5, "outlined", seed=1)
    items = [
        TrainingItem(latents=latent, conditioning=g.caption, batch_key=latent.shape)
        for latent, g in zip(encode(pictures_of(glyphs)), glyphs, strict=True)
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


def test_two_runs_with_one_seed_give_the_same_bytes_and_another_seed_gives_others():
    first, second = train(*make_run()), train(*make_run())
    assert_equal_states(first, second)
    other = train(*make_run(dataclasses.replace(PLAN, seed=8)))
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_the_random_state_of_the_host_is_left_alone():
    run, model = make_run()
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    train(run, model)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("half", [1, 3, 5])
def test_n_steps_plus_resume_equals_the_uninterrupted_run_bit_for_bit(half, tmp_path):
    from comfyui_braid.engine.training.state import read_state, write_state

    whole_run, model = make_run()
    whole = train(whole_run, model)
    first, model = make_run()
    train(first, model, until=half)
    write_state(tmp_path / "run.state", first.state_dict())
    second, model = make_run()
    second.load_state_dict(read_state(tmp_path / "run.state"))
    assert second.step == half
    assert_equal_states(train(second, model), whole)
    assert second.history == whole_run.history


def test_loss_falls_and_every_step_has_one_record():
    run, model = make_run(dataclasses.replace(PLAN, steps=40, learning_rate=1e-2), dropout=0.0)
    train(run, model)
    losses = run.history.losses
    assert [record.step for record in run.history.records] == list(range(1, 41))
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert all(len(record.timesteps) in (1, 2) for record in run.history.records)


def test_accumulated_batches_count_as_one_step_and_average_their_gradients():
    plan = dataclasses.replace(PLAN, steps=1, gradient_accumulation_steps=3)
    run, model = make_run(plan, optimizer=OptimizerSpec(optimizer_type="SGD"))
    train(run, model)
    record = run.history.records[0]
    assert len(record.timesteps) == 5  # batches of 2, 2 and 1: the whole epoch
    assert run.epoch == 1


def test_items_of_different_shape_never_share_a_batch():
    items = [
        TrainingItem(latents=torch.zeros(1, h, h), conditioning=None, batch_key=h)
        for h in (2, 4, 2, 4, 2, 4, 4)
    ]
    dataset = Dataset(items)
    for epoch in range(5):
        batches = dataset.batches(seed=1, epoch=epoch, batch_size=2)
        assert len(batches) == dataset.batches_per_epoch(2) == 4
        assert sorted(i for batch in batches for i in batch) == list(range(7))
        assert all(len({items[i].batch_key for i in batch}) == 1 for batch in batches)


def test_nan_loss_stops_the_run_with_finite_weights():
    run, model = make_run()
    whole = run.denoiser.target
    run.denoiser.target = lambda latents, noise, t: (
        whole(latents, noise, t) * (math.nan if run.step == 3 else 1.0)
    )
    with pytest.raises(TrainingDiverged, match="step 4"):
        train(run, model)
    assert len(run.history.records) == 3
    assert all(torch.isfinite(p).all() for p in run.network.parameters())


def test_loraplus_steps_the_up_matrices_with_its_ratio():
    spec = NetworkSpec(rank=4, alpha=4, loraplus_lr_ratio=8.0)
    run, model = make_run(spec=spec)
    train(run, model)
    for record in run.history.records:
        low, high = record.learning_rates
        assert high == pytest.approx(8 * low)


def test_loss_weights_apply_to_their_own_sample():
    sampling = TimestepSampling(mode="uniform", weighting_scheme="sigma_sqrt")
    run, model = make_run(sampling=sampling)
    train(run, model)
    for record in run.history.records:
        t = torch.tensor(record.timesteps, dtype=torch.float64)
        losses = torch.tensor(record.sample_losses, dtype=torch.float64)
        expected = (sampling.loss_weight(t) * losses).mean()
        assert record.loss == pytest.approx(float(expected), rel=1e-5)


KILLED = """
import sys, pathlib
sys.path[:0] = [{tests!r}, {engine_tests!r}]
import conftest
import test_training_loop as t
from comfyui_braid.engine.training.options import Checkpointing
from comfyui_braid.engine.training.saving import Saver, saved
from comfyui_braid.engine.network.attach import attached
import dataclasses, safetensors.torch
from comfyui_braid.engine.files import write_safetensors
run, model = t.make_run(dataclasses.replace(t.PLAN, steps=10**6))
write = lambda path, metadata: write_safetensors(path, run.network.state_dict(), metadata)
saver = Saver(pathlib.Path({folder!r}), "lora",
              Checkpointing(save_every_n_steps=2, save_last_n=3, save_state=True), write, {{"seed": 7}})
with attached(model, run.network):
    for step in saved(run.steps(), run, saver):
        print(step.step, flush=True)
"""


def test_a_killed_process_leaves_only_whole_files_and_can_be_resumed(tmp_path):
    from comfyui_braid.engine.training.saving import find_state, resumed

    here = Path(__file__).resolve()
    code = KILLED.format(
        tests=str(here.parent.parent), engine_tests=str(here.parent), folder=str(tmp_path / "lora")
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    done = 0
    while done < 9:
        done = int(process.stdout.readline())
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    adapters = sorted((tmp_path / "lora").glob("*.safetensors"))
    assert adapters
    for path in adapters:
        assert safetensors.torch.load_file(path)
    state = find_state(tmp_path, "lora", "latest")
    run, _ = make_run(dataclasses.replace(PLAN, steps=10**6))
    resumed(run, state, {"seed": 7})
    assert run.step >= 8 and run.step % 2 == 0
    assert len(run.history.records) == run.step
