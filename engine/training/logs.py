"""Figures of a run in TensorBoard and W&B, under musubi-tuner's names and folders."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from ..refusals import said
from .history import StepRecord, ValidationRecord
from .loop import TrainingRun
from .options import TrainingLog

logger = logging.getLogger("comfyui_braid.training")

HISTOGRAM_EVERY_STEPS = 50
WEIGHT_NORM_TAGS = ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm")


class Tracker(Protocol):
    """One place where figures go; x is always the number of optimizer steps done."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def histogram(self, tag: str, values: np.ndarray, step: int) -> None: ...
    def image(self, tag: str, picture: np.ndarray, step: int) -> None: ...
    def close(self) -> None: ...


class TrainingLogs:
    """Turns what is new in a run's history into scalars, once per optimizer step."""

    def __init__(
        self,
        trackers: list[Tracker],
        run: TrainingRun,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        """Records that `run` already has, from before a resume, are not logged again."""
        self._trackers = trackers
        self._warn = warn
        self._run = run
        self._logged = len(run.history.records)
        self._validated = len(run.history.validations)
        self._timesteps: list[float] = []

    def record(self) -> None:
        """Log every record and validation that came since the last call, in order of steps."""
        history = self._run.history
        new: list[StepRecord | ValidationRecord] = [
            *history.records[self._logged :],
            *history.validations[self._validated :],
        ]
        self._validated = len(history.validations)
        for record in sorted(new, key=lambda record: record.step):
            if isinstance(record, ValidationRecord):
                self._log_validation(record)
            else:
                self._logged += 1
                self._log_step(record)

    def record_image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """picture: (H, W, 3) in [0, 1]."""
        self._run.read_records()
        self.record()  # W&B drops steps that come after a later one
        self._tell(lambda tracker: tracker.image(tag, picture, step))

    def close(self) -> None:
        try:
            self.record()
            self._log_timesteps(self._run.step)
        finally:
            self._tell(lambda tracker: tracker.close())

    def _log_step(self, record: StepRecord) -> None:
        run = self._run
        average = run.history.average_until(self._logged, run.steps_per_epoch)
        rates = zip(run.optimization.group_names, record.learning_rates, strict=True)
        adapted = run.optimization.adapted_learning_rates()
        values = step_scalars(record, average, dict(rates), adapted)
        if run.epoch_after(record.step) > run.epoch_after(record.step - 1):
            values["loss/epoch"] = average
        self._scalars(values, record.step)
        self._timesteps += record.timesteps
        if record.step % HISTOGRAM_EVERY_STEPS == 0:
            self._log_timesteps(record.step)

    def _log_validation(self, record: ValidationRecord) -> None:
        measured = [(i, loss) for i, loss in enumerate(record.bins) if not math.isnan(loss)]
        bins = {f"loss/validation_bin/{i}": loss for i, loss in measured}
        self._scalars({"loss/validation": record.loss, **bins}, record.step)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        self._tell(lambda tracker: tracker.scalars(values, step))

    def _log_timesteps(self, step: int) -> None:
        """The noise levels drawn since the last histogram, if any."""
        if self._timesteps:
            drawn = np.asarray(self._timesteps)
            self._tell(lambda tracker: tracker.histogram("timesteps", drawn, step))
            self._timesteps = []

    def _tell(self, act: Callable[[Tracker], None]) -> None:
        """Tell every tracker; one that cannot write any more is left out from then on."""
        for tracker in tuple(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # a full disk, or whatever W&B makes of a lost connection
                self._warn(f"logging stops here, training goes on ({said(error)})")
                self._trackers.remove(tracker)


def step_scalars(
    record: StepRecord,
    average: float,
    rates: Mapping[str, float],
    adapted: Mapping[str, float],
) -> dict[str, float]:
    """The scalars of one optimizer step: musubi's tags, and the gradient norm.

    `average`: mean loss of the last epoch; `rates` and `adapted` (Prodigy's d * lr): by group.
    """
    return {
        "loss/current": record.loss,
        "loss/average": average,
        **{f"lr/{name}": rate for name, rate in rates.items()},
        **{f"lr/d*lr/{name}": rate for name, rate in adapted.items()},
        **dict(zip(WEIGHT_NORM_TAGS, record.weight_norms, strict=False)),
        "grad_norm": record.gradient_norm,
    }


def open_logs(
    log: TrainingLog,
    config: Mapping[str, Any],
    run: TrainingRun,
    warn: Callable[[str], None] = logger.warning,
) -> TrainingLogs:
    """Open the trackers that `log` asks for; ValueError with the pip command if one is missing.

    One that cannot write its files is left out with a warning. `config` goes with the run and may
    be uploaded: it must hold no path and no secret.
    """
    folder = log.logging_dir / f"{log.log_prefix}{time.strftime('%Y%m%d%H%M%S')}"
    openers: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
    wanted = openers if log.log_with == "all" else {log.log_with: openers[log.log_with]}
    trackers: list[Tracker] = []
    for name, open_ in wanted.items():
        try:
            trackers.append(open_(log, folder, config))
        except OSError as error:
            warn(
                f"{name} cannot write in {folder} ({error.strerror or error}): this run is trained "
                "without it"
            )
    return TrainingLogs(trackers, run, warn)


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
        _refuse_without_login(wandb)
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=log.log_tracker_name,
                name=log.wandb_run_name or None,
                dir=str(folder),
                config=dict(config),
                reinit="create_new",
                settings=wandb.Settings(
                    console="off",  # the host's console is not ours to send
                    disable_git=True,
                    disable_code=True,
                    x_disable_meta=True,  # paths, command line and user name
                    x_disable_machine_info=True,
                    x_save_requirements=False,  # the list of installed packages
                ),
            )
        except wandb.Error as error:
            raise ValueError(
                f"log_with wandb: W&B does not start ({said(error)}); start ComfyUI with "
                "WANDB_MODE=offline, or log with tensorboard"
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        self._run.log({tag: self._wandb.Histogram(values)}, step=step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        self._run.log({tag: self._wandb.Image((picture * 255).astype(np.uint8))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _refuse_without_login(wandb: ModuleType) -> None:
    """ValueError rather than a question on a console that nobody sees."""
    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        logged_in = wandb.login(timeout=1)
    except wandb.Error:
        logged_in = False
    if not logged_in:
        raise ValueError(
            "log_with wandb: this machine is not logged in to W&B; run `wandb login` in a "
            "terminal, or start ComfyUI with WANDB_MODE=offline"
        )
