"""Where a run's files go, which of them are kept, and whether a saved state belongs to a run."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import Checkpoint, Checkpoints
from .dataset import Dataset
from .loop import TrainingRun, TrainingStep
from .options import Checkpointing
from .state import STATE_SUFFIX, read_state, write_state

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
        self._best: tuple[float, int] | None = None

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
        self._prune()
        return path

    def save_state(self, run: TrainingRun) -> Path:
        path = self._adapter_path(run.step).with_suffix(STATE_SUFFIX)
        run.optimization.set_averaged(False)
        state = {"identity": self.identity, "run": run.state_dict(), **self._extra_state()}
        write_state(path, state)
        return path

    def save_final(self, run: TrainingRun) -> Path:
        """Save the finished adapter under the run's own name."""
        self._write(self.final, run)
        if self.checkpointing.save_state:
            self.save_state(run)
        return self.final

    def continued(self, run: TrainingRun) -> None:
        """After a resume: the checkpoints up to that step that are already in the folder."""
        for path in self.folder.glob(f"{self.name}-step*.safetensors"):
            found = STEP_NAME.search(path.name)
            if found and int(found[1]) <= run.step:
                self._saved[int(found[1])] = path
        scored = [(v.loss, v.step) for v in run.history.validations if v.step in self._saved]
        self._best = min(scored, default=None)

    def checkpoints(self) -> Checkpoints:
        """Every kept step checkpoint, oldest first."""
        files = [Checkpoint(path=self._saved[step], step=step) for step in sorted(self._saved)]
        return Checkpoints(files=tuple(files))

    def _adapter_path(self, step: int) -> Path:
        return self.folder / f"{self.name}-step{step:08d}.safetensors"

    def _write(self, path: Path, run: TrainingRun) -> None:
        run.read_records()
        metadata = {"ss_steps": str(run.step), "ss_epoch": str(run.epoch)}
        if run.history.records:
            metadata["braid_loss"] = repr(run.history.average(run.steps_per_epoch))
        metadata |= self._validation_metadata(run)
        run.optimization.set_averaged(True)
        try:
            self._write_adapter(path, metadata)
        finally:
            run.optimization.set_averaged(False)

    def _validation_metadata(self, run: TrainingRun) -> dict[str, str]:
        if not run.history.validations or run.history.validations[-1].step != run.step:
            return {}
        loss = run.history.validations[-1].loss
        if self._best is not None and loss >= self._best[0]:
            return {VALIDATION_LOSS: repr(loss)}
        self._best = (loss, run.step)
        return {VALIDATION_LOSS: repr(loss), BEST: "true"}

    def _prune(self) -> None:
        """Keep the last N by count, and the best."""
        keep = self.checkpointing.save_last_n
        if not keep:
            return
        best = self._best[1] if self._best else None
        for step in sorted(self._saved)[:-keep]:
            if step != best:
                path = self._saved.pop(step)
                path.unlink(missing_ok=True)
                path.with_suffix(STATE_SUFFIX).unlink(missing_ok=True)


def saved(steps: Iterable[TrainingStep], run: TrainingRun, saver: Saver) -> Iterator[TrainingStep]:
    """Pass the steps through and save whenever a checkpoint is due."""
    for step in steps:
        if saver.is_due(step.step):
            saver.save_step(run)
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
        if not path.is_file():
            raise ValueError(f"resume: there is no file {path}; choose a {STATE_SUFFIX} file")
        return path
    name = Path(output_name).name
    folders = (root / output_name).parent.glob(f"{name}*")
    states = [
        state
        for folder in folders
        if re.fullmatch(re.escape(name) + r"(_\d+)?", folder.name)
        for state in folder.glob(f"{name}-step*{STATE_SUFFIX}")
    ]
    return max(states, key=lambda path: (path.parent.stat().st_mtime, path.name), default=None)


def resumed(run: TrainingRun, path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Put the run where the state file `path` left it; returns the rest of that state.

    ValueError, with nothing changed, when the state is damaged or of another network, data or plan.
    """
    state = read_state(path)
    for name, ours in identity.items():
        theirs = state["identity"].get(name)
        if theirs != ours:
            raise ValueError(
                f"resume: {path.name} was saved with {name} {theirs}, this run has {ours}; "
                "resume with the same setting, or clear resume to start afresh"
            )
    if int(state["run"]["step"]) >= run.plan.steps:
        raise ValueError(
            f"resume: {path.name} is already at step {int(state['run']['step'])} of "
            f"{run.plan.steps}; raise steps to train on"
        )
    run.load_state_dict(state["run"])
    return {key: value for key, value in state.items() if key not in ("identity", "run")}


def dataset_fingerprint(dataset: Dataset) -> str:
    """SHA-256 over the latents of every item, in order, and how items may be batched."""
    digest = hashlib.sha256()
    for item in dataset.items:
        digest.update(repr((tuple(item.latents.shape), item.batch_key)).encode())
        digest.update(item.latents.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
