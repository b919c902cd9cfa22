"""Where a run's files go, which of them are kept, and which state a run goes on from."""

import contextlib
import glob
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...checkpoints import Checkpoint, Checkpoints
from ...disk.reading import shown
from ...disk.writing import NotWrittenError, remove_leftovers
from ..loop import TrainingRun, TrainingStep
from ..options import Checkpointing
from .identity import Identity
from .state import STATE_SUFFIX, write_state

logger = logging.getLogger("comfyui_braid.training")

WriteAdapter = Callable[[Path, Mapping[str, str]], None]
"""Write the network to a path with extra metadata, whole or not at all."""
STEP_NAME = re.compile(r"-step(\d{8})\.")
LATEST = "latest"
"""The `resume` that means the furthest state of the run's own name."""
BEST, VALIDATION_LOSS = "braid_best_so_far", "braid_validation_loss"


class Saver:
    """Writes the adapter files and states of one run into one folder."""

    def __init__(
        self,
        folder: Path,
        name: str,
        checkpointing: Checkpointing,
        write_adapter: WriteAdapter,
        identity: Identity,
        extra_state: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """identity: what must be equal for a resume; extra_state: more to save beside the run's."""
        self.folder = folder
        self.name = name
        self.checkpointing = checkpointing
        self.final: Path = folder / f"{name}.safetensors"
        self._write_adapter = write_adapter
        self.identity = identity
        self._extra_state = extra_state
        self._saved: dict[int, Path] = {}
        self._states: set[int] = set()
        self._final_step: int | None = None

    def is_due(self, step: int) -> bool:
        return step in self.checkpointing.saving_steps(step)

    @property
    def last_saved(self) -> int | None:
        """The newest step with a file of its own; None while there is none."""
        return max(self._saved, default=None)

    def save_step(self, run: TrainingRun) -> Path:
        """Save the adapter (and the state, if asked for) of the step just done."""
        path = self.save_adapter(run)
        if self.checkpointing.save_state:
            self.save_state(run)
        self.prune(run)
        return path

    def save_adapter(self, run: TrainingRun) -> Path:
        """Save the adapter of the step just done; nothing older goes for it."""
        path = self._adapter_path(run.step)
        self._write_adapter_file(path, run)
        self._saved[run.step] = path
        return path

    def save_state(self, run: TrainingRun) -> Path:
        path = self._adapter_path(run.step).with_suffix(STATE_SUFFIX)
        state = {"identity": self.identity.named, "run": run.state_dict(), **self._extra_state()}
        write_state(path, state)
        self._states.add(run.step)
        return path

    def has_saved(self, step: int) -> bool:
        """Whether adapter and state of that step are already there."""
        return step in self._saved and step in self._states

    def save_final(self, run: TrainingRun, warn: Callable[[str], None] = logger.warning) -> Path:
        """Save the finished adapter under the run's own name, and its state if asked for."""
        self._write_adapter_file(self.final, run)
        self._final_step = run.step
        if self.checkpointing.save_state and run.step not in self._states:
            try:
                self.save_state(run)
            except (NotWrittenError, ValueError) as error:
                warn(f"the finished LoRA is saved, but not its state ({error})")
        return self.final

    def continued(self, run: TrainingRun) -> None:
        """After a resume: the checkpoints up to that step that are already in the folder."""
        remove_leftovers(self.folder)
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

    def metadata(self, run: TrainingRun) -> dict[str, str]:
        """What an adapter file of the step just done says beside what is the same in all."""
        run.read_records()
        metadata = {"ss_steps": str(run.step), "ss_epoch": str(run.epoch)}
        if run.history.records:
            metadata["braid_loss"] = repr(run.history.average(run.steps_per_epoch))
        return metadata | self._validation_metadata(run)

    def _write_adapter_file(self, path: Path, run: TrainingRun) -> None:
        metadata = self.metadata(run)
        with run.optimization.in_eval_mode():
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

    def prune(self, run: TrainingRun) -> None:
        """Keep the last N by count, and the best."""
        _, best = min(self._scored(run), default=(math.inf, None))
        kept = {best, *self.checkpointing.kept(sorted(self._saved))}
        for step in sorted(self._saved):
            if step not in kept:
                with contextlib.suppress(OSError):  # in use, on Windows: it goes next time
                    self._saved[step].unlink(missing_ok=True)
                    self._saved[step].with_suffix(STATE_SUFFIX).unlink(missing_ok=True)
                    del self._saved[step]


def saved(
    steps: Iterable[TrainingStep],
    run: TrainingRun,
    saver: Saver,
    warn: Callable[[str], None] = logger.warning,
) -> Iterator[TrainingStep]:
    """Pass the steps through and save whenever a checkpoint is due.

    A checkpoint that cannot be written, such as on a full disk, is no reason to lose the run.
    """
    for step in steps:
        if saver.is_due(step.step):
            try:
                saver.save_step(run)
            except NotWrittenError as error:
                warn(
                    f"the checkpoint of step {step.step} was not saved ({error}); what was saved "
                    "before stays, training goes on and tries again at the next one"
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

    LATEST is the furthest state of this output_name, None when there is none yet.
    """
    if not resume:
        return None
    if resume != LATEST:
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
