"""Figures of a run in TensorBoard and W&B, under musubi-tuner's names and folders."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .history import StepRecord, ValidationRecord
from .loop import TrainingRun, TrainingStep
from .options import TrainingLog

logger = logging.getLogger("comfyui_braid.training")

HISTOGRAM_EVERY_STEPS = 50


class Tracker(Protocol):
    """One place where figures go; x is always the number of optimizer steps done."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def histogram(self, tag: str, values: np.ndarray, step: int) -> None: ...
    def image(self, tag: str, picture: np.ndarray, step: int) -> None: ...
    def close(self) -> None: ...


class TrainingLogs:
    """Turns a run's records into scalars, once per optimizer step."""

    def __init__(self, trackers: list[Tracker], group_names: tuple[str, ...]) -> None:
        self._trackers = trackers
        self._group_names = group_names
        self._timesteps: list[float] = []

    def record_step(self, step: TrainingStep, run: TrainingRun) -> None:
        """Log what became readable with this step."""
        adapted = run.optimization.adapted_learning_rates()
        for record in step.records:
            average = _average_until(run, record)
            self._scalars(step_scalars(record, average, self._group_names, adapted), record.step)
            if record.step % run.steps_per_epoch == 0:
                self._scalars({"loss/epoch": average}, record.step)
            self._log_timesteps(record)

    def record_validation(self, record: ValidationRecord) -> None:
        bins = {f"loss/validation_bin/{i}": loss for i, loss in enumerate(record.bins)}
        self._scalars({"loss/validation": record.loss, **bins}, record.step)

    def record_image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """picture: (H, W, 3) in [0, 1]."""
        for tracker in self._trackers:
            tracker.image(tag, picture, step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.scalars(values, step)

    def _log_timesteps(self, record: StepRecord) -> None:
        self._timesteps += record.timesteps
        if record.step % HISTOGRAM_EVERY_STEPS == 0:
            for tracker in self._trackers:
                tracker.histogram("timesteps", np.asarray(self._timesteps), record.step)
            self._timesteps.clear()


def _average_until(run: TrainingRun, record: StepRecord) -> float:
    """Mean loss over the last epoch of steps up to `record`, as musubi's loss/average."""
    losses = run.history.losses[: record.step]
    window = losses[-run.steps_per_epoch :]
    return sum(window) / len(window)


def step_scalars(
    record: StepRecord,
    average: float,
    group_names: tuple[str, ...],
    adapted: Mapping[str, float],
) -> dict[str, float]:
    """The scalars of one optimizer step: musubi's tags, and the gradient norm."""
    rates = zip(group_names, record.learning_rates, strict=True)
    return {
        "loss/current": record.loss,
        "loss/average": average,
        **{f"lr/{name}": rate for name, rate in rates},
        **{f"lr/d*lr/{name}": rate for name, rate in adapted.items()},
        "grad_norm": record.gradient_norm,
    }


def open_logs(
    log: TrainingLog, config: Mapping[str, Any], group_names: tuple[str, ...]
) -> TrainingLogs:
    """Open the trackers that `log` asks for; ValueError with the pip command if one is missing."""
    folder = log.logging_dir / f"{log.log_prefix}{time.strftime('%Y%m%d%H%M%S')}"
    openers = {"tensorboard": _TensorBoard, "wandb": _WandB}
    wanted = openers if log.log_with == "all" else {log.log_with: openers[log.log_with]}
    return TrainingLogs([open_(log, folder, config) for open_ in wanted.values()], group_names)


class _TensorBoard:
    def __init__(self, log: TrainingLog, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "log_with tensorboard needs the package tensorboard, which is not installed here: "
                "pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder / log.log_tracker_name))
        rows = "\n".join(f"    {key} = {value}" for key, value in config.items())
        self._writer.add_text("config", rows, 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        self._writer.add_histogram(tag, values, step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        self._writer.add_image(tag, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, log: TrainingLog, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "log_with wandb needs the package wandb, which is not installed here: "
                "pip install wandb"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=log.log_tracker_name,
            name=log.wandb_run_name or None,
            dir=str(folder),
            config=dict(config),
            reinit="create_new",
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        self._run.log({tag: self._wandb.Histogram(values)}, step=step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        self._run.log({tag: self._wandb.Image((picture * 255).astype(np.uint8))}, step=step)

    def close(self) -> None:
        self._run.finish()
