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
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import PLAN, assert_equal_states, make_run, train

from comfyui_braid.engine.network.attach import attached
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.engine.training.dataset import Dataset, TrainingItem
from comfyui_braid.engine.training.loop import TrainingDiverged
from comfyui_braid.engine.training.optimizers.optimizer import OPTIMIZERS, OptimizerSpec
from comfyui_braid.engine.training.states.identity import Identity
from comfyui_braid.engine.training.states.resume import resumed
from comfyui_braid.engine.training.states.saving import find_state
from comfyui_braid.engine.training.states.state import read_state, write_state


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


def uninterrupted_and_resumed(tmp_path, half, make):
    whole_run, model = make()
    whole = train(whole_run, model)
    first, model = make()
    train(first, model, until=half)
    write_state(tmp_path / "run.state", first.state_dict())
    second, model = make()
    second.load_state_dict(read_state(tmp_path / "run.state"))
    assert second.step == half
    assert_equal_states(train(second, model), whole)
    assert repr(second.history) == repr(whole_run.history)  # NaN equals NaN


@pytest.mark.parametrize("half", [1, 3, 5])
def test_n_steps_plus_resume_equals_the_uninterrupted_run_bit_for_bit(half, tmp_path):
    uninterrupted_and_resumed(tmp_path, half, make_run)


def test_a_resume_is_exact_with_accumulation_over_items_of_two_shapes(tmp_path):
    plan = dataclasses.replace(PLAN, steps=5, gradient_accumulation_steps=2)
    uninterrupted_and_resumed(tmp_path, 3, lambda: make_run(plan, tall=(1, 3)))


def test_a_resume_is_exact_with_limited_weight_norms_which_the_history_keeps(tmp_path):
    plan = dataclasses.replace(PLAN, steps=4, learning_rate=0.1, scale_weight_norms=0.05)
    uninterrupted_and_resumed(tmp_path, 2, lambda: make_run(plan))
    run, model = make_run(plan)
    train(run, model)
    scaled, mean, largest = run.history.records[-1].weight_norms
    assert scaled > 0 and mean <= largest * 1.0001 <= 0.05 * 1.001


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerSpec(optimizer_type="AdamWScheduleFree"),
        OptimizerSpec(optimizer_type="Prodigy"),
        OptimizerSpec(optimizer_type="Adafactor"),
        OptimizerSpec(optimizer_type="AdamW8bit", optimizer_args={"min_8bit_size": 1}),
        OptimizerSpec(lr_scheduler="rex", lr_warmup_steps=2),
    ],
    ids=lambda spec: f"{spec.optimizer_type}-{spec.lr_scheduler}",
)
def test_a_resume_is_exact_with_every_kind_of_optimizer(optimizer, tmp_path):
    if optimizer.optimizer_type != "AdamW":
        pytest.importorskip(OPTIMIZERS[optimizer.optimizer_type].split(".")[0])
    rate = 1.0 if optimizer.optimizer_type == "Prodigy" else 1e-3
    plan = dataclasses.replace(PLAN, steps=4, learning_rate=rate)
    uninterrupted_and_resumed(tmp_path, 2, lambda: make_run(plan, optimizer=optimizer))


def test_showing_the_average_of_a_schedule_free_optimizer_changes_nothing_that_follows():
    pytest.importorskip("schedulefree")
    optimizer = OptimizerSpec(optimizer_type="AdamWScheduleFree")
    whole = train(*make_run(optimizer=optimizer))
    run, model = make_run(optimizer=optimizer)
    train(run, model, until=3)
    trained = {k: v.clone() for k, v in run.network.state_dict().items()}
    with run.optimization.in_eval_mode():
        shown = {k: v.clone() for k, v in run.network.state_dict().items()}
    assert not all(torch.equal(shown[k], trained[k]) for k in shown)
    assert_equal_states({k: v for k, v in run.network.state_dict().items()}, trained)
    assert_equal_states(train(run, model), whole)


def test_fp16_scales_its_loss_skips_what_overflows_and_resumes_exactly(tmp_path):
    plan = dataclasses.replace(PLAN, steps=5, mixed_precision="fp16")

    def make():
        run, model = make_run(plan)
        first = next(run.network.parameters())
        first.register_hook(lambda grad: grad * (math.inf if run.step == 1 else 1.0))
        return run, model

    run, model = make()
    before = train(run, model, until=1)
    scale = run._scaler.get_scale()
    assert_equal_states(train(run, model, until=2), before)
    assert run._scaler.get_scale() == scale / 2
    assert math.isinf(run.history.records[1].gradient_norm) or math.isnan(
        run.history.records[1].gradient_norm
    )
    trained = train(run, model)
    assert not all(torch.equal(before[k], trained[k]) for k in before)
    uninterrupted_and_resumed(tmp_path, 2, make)


def test_the_speed_leaves_out_steps_that_met_a_shape_for_the_first_time():
    """Compiling happens in those: batches of two and of one are each met once."""
    run, model = make_run(dataclasses.replace(PLAN, steps=6))
    seconds = []
    with attached(model, run.network):
        for step in run.steps():
            seconds.append(step.seconds)
    sizes = [len(record.timesteps) for record in run.history.records]
    counted = [s for i, s in enumerate(seconds) if sizes[i] in sizes[:i]]
    assert len(counted) == 4
    assert run.seconds_per_step == pytest.approx(sum(counted) / 4)
    assert run.first_step_seconds == seconds[0]


def test_a_step_that_was_broken_off_is_made_again_in_full():
    whole = train(*make_run())
    run, model = make_run()
    raw_output, calls = run.denoiser.raw_output, []

    def broken_once(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return raw_output(*args)

    run.denoiser.raw_output = broken_once
    with pytest.raises(KeyboardInterrupt):
        train(run, model)
    assert run.step == 2
    assert_equal_states(train(run, model), whole)


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


def test_nan_loss_stops_the_run_with_the_weights_from_before_it():
    run, model = make_run()
    whole, weights = run.denoiser.target, {}

    def broken(latents, noise, t):
        if run.step == 3:
            weights.update({k: v.clone() for k, v in run.network.state_dict().items()})
            return whole(latents, noise, t) * math.nan
        return whole(latents, noise, t)

    run.denoiser.target = broken
    with pytest.raises(TrainingDiverged, match="step 4"):
        train(run, model)
    assert run.step == len(run.history.records) == 3
    assert_equal_states(run.network.state_dict(), weights)
    assert all(torch.isfinite(p).all() for p in run.network.parameters())


def test_where_losses_are_read_late_nan_never_reaches_the_weights():
    """As on an accelerator: the NaN of step 2 is read after step 5, and every step has a record."""
    plan = dataclasses.replace(PLAN, steps=8)
    run, model = make_run(plan)
    run._read_every = 5
    whole = run.denoiser.target
    run.denoiser.target = lambda latents, noise, t: (
        whole(latents, noise, t) * (math.nan if run.step == 1 else 1.0)
    )
    with pytest.raises(TrainingDiverged, match="step 2"):
        train(run, model)
    assert run.step == len(run.history.records) == 5
    assert all(torch.isfinite(p).all() for p in run.network.parameters())
    assert math.isfinite(run.history.average(5))


class CountSyncs(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator: reading one number, or a data size.

    torch's Adam keeps its step counts on the CPU always, where reading them waits for nothing.
    """

    def __init__(self, optimizer):
        super().__init__()
        self.syncs = 0
        self._counters = {state["step"].data_ptr() for state in optimizer.state.values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = str(func).startswith(
            ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")
        )
        if waits and args[0].data_ptr() not in self._counters:
            self.syncs += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norms", [0.0, 0.05])
def test_a_step_does_not_wait_for_the_device_between_two_reads_of_the_loss(norms):
    plan = dataclasses.replace(PLAN, scale_weight_norms=norms)
    run, model = make_run(plan, optimizer=OptimizerSpec(lr_scheduler="cosine"))
    run._read_every = 10  # as on an accelerator
    with attached(model, run.network):
        steps = run.steps()
        next(steps)
        with CountSyncs(run.optimization.optimizer) as counted:
            next(steps)
            next(steps)
            assert counted.syncs == 0
            run.read_records()
            float(next(run.network.parameters()).detach().sum())
            assert counted.syncs == 1  # it does count
    assert len(run.history.records) == 3


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
import training_runs as t
from comfyui_braid.engine.training.options import Checkpointing
from comfyui_braid.engine.training.states.saving import Saver, saved
from comfyui_braid.engine.network.attach import attached
import dataclasses, safetensors.torch
from comfyui_braid.engine.files import write_safetensors
from comfyui_braid.engine.training.states.identity import Identity
run, model = t.make_run(dataclasses.replace(t.PLAN, steps=10**6))
write = lambda path, metadata: write_safetensors(path, run.network.state_dict(), metadata)
often = Checkpointing(save_every_n_steps=2, save_last_n=3, save_state=True)
saver = Saver(pathlib.Path({folder!r}), "lora", often, write, Identity(named={{"seed": 7}}))
with attached(model, run.network):
    for step in saved(run.steps(), run, saver):
        print(step.step, flush=True)
"""


def test_a_killed_process_leaves_only_whole_files_and_can_be_resumed(tmp_path):
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
    resumed(run, state, Identity(named={"seed": 7}))
    assert run.step >= 8 and run.step % 2 == 0
    assert len(run.history.records) == run.step
