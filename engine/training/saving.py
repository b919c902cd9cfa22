"""Where a run's files go, which of them are kept, and which state a run goes on from."""

import glob
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import Checkpoint, Checkpoints
from ..files import PARTIAL_SUFFIX
from ..reading import shown
from .loop import TrainingRun, TrainingStep
from .options import Checkpointing
from .state import STATE_SUFFIX, write_state

logger = logging.getLogger("comfyui_braid.training")

WriteAdapter = Callable[[Path, Mapping[str, str]], None]
"""Write the network to a path with extra metadata, whole or not at all."""
STEP_NAME = re.compile(r"-step(\d{8})\.")
BEST, VALIDATION_LOSS = "braid_best_so_far", "braid_validation_loss"


class Saver:
    """Writes the adapter files and states of one run into one folder."""

    def __init__(
        self,
        folder: Path,
        name: str,
        checkpointing: Checkpointing,
        write_adapter: WriteAdapter,
        identity: Mapping[str, Any],
        extra_state: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """identity: what must be equal for a resume; extra_state: more to save beside the run's."""
        self.folder = folder
        self.name = name
        self.checkpointing = checkpointing
        self.final: Path = folder / f"{name}.safetensors"
        self._write_adapter = write_adapter
        self.identity = dict(identity)
        self._extra_state = extra_state
        self._saved: dict[int, Path] = {}
        self._final_step: int | None = None

    def is_due(self, step: int) -> bool:
        every = self.checkpointing.save_every_n_steps
        return every > 0 and step % every == 0

    def save_step(self, run: TrainingRun, *, with_state: bool | None = None) -> Path:
        """Save the adapter (and the state, if asked for) of the step just done."""
        path = self._adapter_path(run.step)
        self._write(path, run)
        self._saved[run.step] = path
        if self.checkpointing.save_state if with_state is None else with_state:
            self.save_state(run)
        self._prune(run)
        return path

    def save_state(self, run: TrainingRun) -> Path:
        path = self._adapter_path(run.step).with_suffix(STATE_SUFFIX)
        state = {"identity": self.identity, "run": run.state_dict(), **self._extra_state()}
        write_state(path, state)
        return path

    def save_final(self, run: TrainingRun) -> Path:
        """Save the finished adapter under the run's own name, and its state if asked for."""
        self._write(self.final, run)
        self._final_step = run.step
        if self.checkpointing.save_state:
            try:
                self.save_state(run)
            except (OSError, ValueError) as error:
                logger.warning("the state of the finished run was not saved (%s)", error)
        return self.final

    def continued(self, run: TrainingRun) -> None:
        """After a resume: the checkpoints up to that step that are already in the folder."""
        for leftover in self.folder.glob(f".{glob.escape(self.name)}*{PARTIAL_SUFFIX}"):
            leftover.unlink(missing_ok=True)  # of a killed process
        for path in self.folder.glob(f"{glob.escape(self.name)}-step*.safetensors"):
            found = STEP_NAME.search(path.name)
            if found and int(found[1]) <= run.step:
                self._saved[int(found[1])] = path

    def checkpoints(self) -> Checkpoints:
        """Every kept step checkpoint, oldest first, and the final file if it is of another step."""
        files = dict(self._saved)
        if self._final_step is not None:
            files.setdefault(self._final_step, self.final)
        return Checkpoints(
            files=tuple(Checkpoint(path=files[step], step=step) for step in sorted(files))
        )

    def _adapter_path(self, step: int) -> Path:
        return self.folder / f"{self.name}-step{step:08d}.safetensors"

    def _write(self, path: Path, run: TrainingRun) -> None:
        run.read_records()
        metadata = {"ss_steps": str(run.step), "ss_epoch": str(run.epoch)}
        if run.history.records:
            metadata["braid_loss"] = repr(run.history.average(run.steps_per_epoch))
        metadata |= self._validation_metadata(run)
        with run.optimization.averaged():
            self._write_adapter(path, metadata)

    def _validation_metadata(self, run: TrainingRun) -> dict[str, str]:
        """The held-out loss of this step, if it was measured, and whether no kept one is lower."""
        if not run.history.validations or run.history.validations[-1].step != run.step:
            return {}
        loss = run.history.validations[-1].loss
        others = [other for other, step in self._scored(run) if step != run.step]
        is_best = math.isfinite(loss) and loss < min(others, default=math.inf)
        return {VALIDATION_LOSS: repr(loss)} | ({BEST: "true"} if is_best else {})

    def _scored(self, run: TrainingRun) -> list[tuple[float, int]]:
        """(held-out loss, step) of the kept checkpoints that have one."""
        return [
            (record.loss, record.step)
            for record in run.history.validations
            if record.step in self._saved and math.isfinite(record.loss)
        ]

    def _prune(self, run: TrainingRun) -> None:
        """Keep the last N by count, and the best."""
        keep = self.checkpointing.save_last_n
        if not keep:
            return
        _, best = min(self._scored(run), default=(math.inf, None))
        for step in sorted(self._saved)[:-keep]:
            if step != best:
                path = self._saved.pop(step)
                path.unlink(missing_ok=True)
                path.with_suffix(STATE_SUFFIX).unlink(missing_ok=True)


def saved(steps: Iterable[TrainingStep], run: TrainingRun, saver: Saver) -> Iterator[TrainingStep]:
    """Pass the steps through and save whenever a checkpoint is due.

    A checkpoint that cannot be written, such as on a full disk, is no reason to lose the run.
    """
    for step in steps:
        if saver.is_due(step.step):
            try:
                saver.save_step(run)
            except OSError as error:
                logger.warning(
                    "the checkpoint of step %d was not saved (%s); files saved before are whole, "
                    "training goes on and tries again at the next one",
                    step.step,
                    error,
                )
        yield step


def free_folder(root: Path, output_name: str) -> Path:
    """root/output_name, or with _2, _3 … where that folder already holds something."""
    folder, number = root / output_name, 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = root / f"{output_name}_{number}"
    return folder


def find_state(root: Path, output_name: str, resume: str) -> Path | None:
    """The state file that `resume` names; None to start afresh.

    "latest" is the furthest state of this output_name, None when there is none yet.
    """
    if not resume:
        return None
    if resume != "latest":
        path = Path(resume) if Path(resume).is_absolute() else root / resume
        if not os.path.isfile(path):  # unlike `is_file`, False where no path could be so long
            raise ValueError(
                f"resume: there is no file {shown(str(path))}; choose a {STATE_SUFFIX} file"
            )
        return path
    name = glob.escape(Path(output_name).name)
    states = [
        state
        for folder in (root / output_name).parent.glob(f"{name}*")
        if re.fullmatch(re.escape(Path(output_name).name) + r"(_\d+)?", folder.name)
        for state in folder.glob(f"{name}-step*{STATE_SUFFIX}")
    ]
    return max(states, key=lambda path: (path.parent.stat().st_mtime, path.name), default=None)


def run_folder(root: Path, output_name: str, state_file: Path | None) -> Path:
    """Where a run saves: beside the state it goes on from, if that is its own; else a free folder.

    A state from elsewhere, or of another output_name, is only read. ValueError where a link below
    root would lead the files elsewhere.
    """
    name = Path(output_name).name
    if state_file is not None and state_file.name.startswith(f"{name}-step"):
        folder = state_file.parent.resolve()
        if folder.is_relative_to(root.resolve()):
            return folder
    folder = free_folder(root, output_name)
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"output_name is {output_name!r}, which a link leads out of {root}")
    return folder


def fingerprint(value: Any) -> str:
    """A short SHA-256 of nested lists and dicts of tensors, numbers and text."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(repr((tuple(value.shape), value.dtype)).encode())
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy())
    elif isinstance(value, Mapping):
        _feed(digest, sorted((str(key), part) for key, part in value.items()))
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _feed(digest, part)
    elif value is None or isinstance(value, (bool, int, float, str)):
        digest.update(repr(value).encode())
    else:  # an object of the host, whose contents are its own affair
        digest.update(type(value).__name__.encode())
