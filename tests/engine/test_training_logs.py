"""Event files read back by tensorboard's own reader, against a golden run of musubi-tuner; W&B."""

import dataclasses
import json
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
from full_disk import NO_ROOM, largest_file
from training_runs import PLAN, make_run

from comfyui_braid.engine.network.attach import attached
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.training.history import LossHistory, StepRecord
from comfyui_braid.engine.training.logs import TrainingLogs, open_logs, step_scalars
from comfyui_braid.engine.training.optimizers.optimizer import OptimizerSpec
from comfyui_braid.engine.training.options import TrainingLog, Validation
from comfyui_braid.engine.training.validation import Validator, validated

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
MUSUBI = json.loads((GOLDENS / "training_logs.json").read_text())["runs"]


def logged_run(folder, plan, log_with="tensorboard", **changes):
    """A run as the trainer logs it; returns (run, its dated folder)."""
    optimizer = OptimizerSpec(lr_scheduler="cosine", lr_warmup_steps=2)
    run, model = make_run(plan, optimizer=optimizer, **changes)
    log = TrainingLog(
        log_with=log_with,
        logging_dir=folder,
        log_prefix="pre_",
        log_tracker_name="my_tracker",
        wandb_run_name="first",
    )
    logs = open_logs(log, {"plan": {"steps": plan.steps}, "optimizer": "AdamW"}, run)
    validator = Validator(run.dataset.items[:1], Validation(every_n_steps=3, timesteps_per_item=2))
    with attached(model, run.network):
        for step in validated(run.steps(), run, validator):
            logs.record()
            if step.step == 2:
                logs.record_image("sample", np.full((4, 6, 3), 0.5, np.float32), step.step)
    logs.close()
    (dated,) = folder.iterdir()
    return run, dated


def read_events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    )
    events.Reload()
    return events


def test_tensorboard_reads_musubis_tags_and_folders_at_the_right_steps(tmp_path):
    plan = dataclasses.replace(
        PLAN, steps=9, batch_size=1, gradient_accumulation_steps=2, scale_weight_norms=0.05
    )
    run, dated = logged_run(tmp_path, plan, spec=NetworkSpec(rank=4, alpha=4, loraplus_lr_ratio=4))
    golden = MUSUBI["loraplus_accum2_norms"]
    (folder, tracker), _ = (path.split("/")[:2] for path in golden["tensorboard_subfolders"])
    assert re.fullmatch(folder.replace("<YYYYmmddHHMMSS>", r"\d{14}"), dated.name)
    assert [path.name for path in dated.iterdir()] == [tracker]
    events = read_events(dated / tracker)
    tags = set(events.Tags()["scalars"])
    assert tags >= set(golden["scalars_step_value"])
    steps = list(range(1, 10))
    for tag in set(golden["scalars_step_value"]) - {"loss/epoch"} | {"grad_norm"}:
        # musubi: one point per batch, several of them at one x and the first at 0
        assert [event.step for event in events.Scalars(tag)] == steps, tag
    losses = [event.value for event in events.Scalars("loss/current")]
    assert losses == pytest.approx(run.history.losses, rel=1e-6)
    rates = [event.value for event in events.Scalars("lr/unet plus")]
    # the rate of the step itself; musubi logs that of the next step
    assert rates == pytest.approx([r.learning_rates[1] for r in run.history.records])
    assert [event.step for event in events.Scalars("loss/validation")] == [3, 6, 9]
    bins = [tag for tag in tags if tag.startswith("loss/validation_bin/")]
    assert 1 <= len(bins) <= 2 and not any(math.isnan(events.Scalars(t)[0].value) for t in bins)
    assert events.Tags()["images"] == ["sample"] and events.Images("sample")[0].step == 2
    assert "steps" in str(events.Tensors("config/text_summary")[0].tensor_proto)
    # a run shorter than the interval of the histograms has one of all it drew, at its end
    (histogram,) = events.Histograms("timesteps")
    drawn = sum(len(record.timesteps) for record in run.history.records)
    assert histogram.step == 9 and histogram.histogram_value.num == drawn


def test_loss_epoch_is_logged_when_an_epoch_ends_at_the_step_where_it_ended(tmp_path):
    plan = dataclasses.replace(PLAN, steps=7, batch_size=1)
    _, dated = logged_run(tmp_path, plan)
    events = read_events(dated / "my_tracker")
    # musubi: x = the number of the epoch, on the axis of the steps
    assert [event.step for event in events.Scalars("loss/epoch")] == [5]
    assert [x for x, _ in MUSUBI["basic"]["scalars_step_value"]["loss/epoch"]] == [1, 2]


def record(step, loss):
    return StepRecord(
        step=step,
        loss=loss,
        gradient_norm=1.0,
        learning_rates=(1e-3,),
        timesteps=(0.5,),
        sample_losses=(loss,),
    )


def test_the_average_loss_is_musubis_moving_average_over_one_epoch():
    golden = MUSUBI["basic"]["scalars_step_value"]
    history = LossHistory([record(step, loss) for step, loss in golden["loss/current"]])
    averages = [history.average_until(count, window=5) for count in range(1, 8)]
    assert averages == pytest.approx([value for _, value in golden["loss/average"]])
    assert MUSUBI["basic"]["metadata"]["ss_num_batches_per_epoch"] == "5"


def test_a_step_that_diverged_is_left_out_of_the_average():
    history = LossHistory([record(1, 1.0), record(2, math.nan), record(3, 3.0)])
    assert history.average(3) == 2.0
    assert math.isnan(LossHistory().average(3))


def test_prodigys_rate_is_logged_under_musubis_tag():
    scalars = step_scalars(record(1, 1.0), 1.0, {"unet": 1.0}, {"unet": 2e-4})
    assert scalars["lr/d*lr/unet"] == 2e-4 and "max_norm/keys_scaled" not in scalars


def test_a_resumed_run_logs_only_what_is_new_at_continued_steps(tmp_path):
    plan = dataclasses.replace(PLAN, steps=4)
    run, model = make_run(plan)
    with attached(model, run.network):
        for step in run.steps():
            if step.step == 2:
                break
        log = TrainingLog(log_with="tensorboard", logging_dir=tmp_path)
        logs = open_logs(log, {}, run)
        for _ in run.steps():
            logs.record()
    logs.close()
    (dated,) = tmp_path.iterdir()
    events = read_events(dated / "network_train")
    assert [event.step for event in events.Scalars("loss/current")] == [3, 4]


class Told:
    """A tracker that notes what it is told."""

    def __init__(self):
        self.points = []

    def scalars(self, values, step):
        self.points += [(step, tag) for tag in values if tag in ("loss/current", "loss/validation")]

    def histogram(self, tag, values, step):
        self.points.append((step, tag, len(values)))

    def close(self):
        pass


def test_a_validation_made_up_for_after_a_resume_is_logged_before_later_steps():
    """W&B drops whatever comes after a later step."""
    run, model = make_run(dataclasses.replace(PLAN, steps=4))
    validator = Validator(run.dataset.items[:1], Validation(every_n_steps=2, timesteps_per_item=1))
    with attached(model, run.network):
        for step in run.steps():
            if step.step == 2:
                break  # cancelled before it could be measured
        tracker = Told()
        logs = TrainingLogs([tracker], run)
        for _ in validated(run.steps(), run, validator):
            logs.record()
    logs.close()
    assert [record.step for record in run.history.validations] == [2, 4]
    assert tracker.points == [
        (2, "loss/validation"),
        (3, "loss/current"),
        (4, "loss/current"),
        (4, "loss/validation"),
        (4, "timesteps", sum(len(r.timesteps) for r in run.history.records[2:])),
    ]


# what tensorboard's thread says as it ends
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_that_cannot_be_written_ends_the_log_and_not_the_run(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    run, model = make_run(dataclasses.replace(PLAN, steps=40))
    log = TrainingLog(log_with="tensorboard", logging_dir=tmp_path)
    said = []
    logs = open_logs(log, {}, run, said.append)
    with attached(model, run.network), largest_file(2000):
        for _ in run.steps():
            logs.record()
        logs.close()
    assert run.step == 40
    (sentence,) = said
    assert re.search(NO_ROOM, sentence) and "training goes on" in sentence


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_at_the_start_costs_the_log_and_not_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    run, _ = make_run()
    log, said = TrainingLog(log_with="tensorboard", logging_dir=tmp_path), []
    with largest_file(0):
        open_logs(log, {}, run, said.append).close()
    (sentence,) = said
    assert re.search(NO_ROOM, sentence)
    # the second where its thread fails only later
    assert re.search("trained without it|training goes on", sentence)


class FullMailbox:
    """As W&B, whose errors are its own."""

    def __init__(self):
        self.calls = 0

    def scalars(self, values, step):
        self.calls += 1
        raise RuntimeError("No space left in W&B's mailbox")

    histogram = image = scalars

    def close(self):
        raise RuntimeError("No space left in W&B's mailbox")


def test_a_tracker_that_fails_in_its_own_way_ends_itself_and_not_the_run(caplog):
    run, model = make_run(dataclasses.replace(PLAN, steps=3))
    tracker = FullMailbox()
    logs = TrainingLogs([tracker], run)
    with attached(model, run.network), caplog.at_level(logging.WARNING, "comfyui_braid"):
        for _ in run.steps():
            logs.record()
        logs.close()
    assert run.step == 3 and tracker.calls == 1
    assert "No space left" in caplog.text and "training goes on" in caplog.text


@pytest.mark.parametrize("package, log_with", [("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_a_missing_log_package_is_one_sentence_with_its_pip_command(
    package, log_with, tmp_path, monkeypatch
):
    import sys

    blocked = "wandb" if package == "wandb" else "torch.utils.tensorboard"
    monkeypatch.setitem(sys.modules, blocked, None)
    run, _ = make_run()
    with pytest.raises(ValueError, match=f"pip install {package}$"):
        open_logs(TrainingLog(log_with=log_with, logging_dir=tmp_path), {}, run)


def test_wandb_offline_writes_a_run_without_paths_or_keys(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    wandb.teardown()
    try:
        plan = dataclasses.replace(PLAN, steps=3)
        _, dated = logged_run(tmp_path / "logs", plan, log_with="wandb")
    finally:
        wandb.teardown()
    (offline,) = (dated / "wandb").glob("offline-run-*")
    (data,) = offline.glob("run-*.wandb")
    written = b"".join(path.read_bytes() for path in offline.rglob("*") if path.is_file())
    assert b"loss/current" in data.read_bytes() and b"my_tracker" in data.read_bytes()
    records = data.read_bytes()
    for secret in (b"0123456789abcdef", Path.home().name.encode() + b"/", str(Path.cwd()).encode()):
        assert secret not in records, secret
    assert b"0123456789abcdef" not in written
    assert not list(offline.rglob("requirements.txt"))


def test_wandb_without_a_login_is_refused_before_training(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    run, _ = make_run()
    try:
        with pytest.raises(ValueError, match="wandb login"):
            open_logs(TrainingLog(log_with="wandb", logging_dir=tmp_path), {}, run)
    finally:
        wandb.teardown()


def test_wandb_that_does_not_start_is_one_sentence_before_training(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")

    def unreachable(**settings):
        raise wandb.errors.CommError("no connection")

    monkeypatch.setattr(wandb, "init", unreachable)
    wandb.teardown()
    run, _ = make_run()
    try:
        with pytest.raises(ValueError, match="does not start .no connection.*WANDB_MODE=offline"):
            open_logs(TrainingLog(log_with="wandb", logging_dir=tmp_path), {}, run)
    finally:
        wandb.teardown()


def test_wandb_disabled_trains_and_writes_nothing(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    try:
        run, dated = logged_run(tmp_path, dataclasses.replace(PLAN, steps=2), log_with="wandb")
    finally:
        wandb.teardown()
    assert run.step == 2 and not list(dated.iterdir())


def test_an_unknown_tracker_is_refused_and_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="tensorboard, wandb, all"):
        TrainingLog(log_with="mlflow", logging_dir=tmp_path)
