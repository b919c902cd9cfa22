"""The files of one run: its adapter, states and EMA shadows, and what they say of it."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from ...checkpoints import SHADOWS_SUFFIX, AdapterStateDict, Checkpoints
from ...disk.writing import NotWrittenError, replaced_when_whole
from ...ema.shadows import SIGMA_RELS, Shadows
from ...network.adapter_file import as_filed, live_tensors, state_dict_of, write_adapter
from ...network.metadata import adapter_metadata
from ...training.loop import TrainingRun, TrainingStep
from ...training.states.resume import resumed
from ...training.states.room import refuse_without_room, room_needed, tight
from ...training.states.saving import Saver, free_folder
from .records import Resolved, musubi_fields, timestep_range

GO_ON = "To go on, link Checkpoints and Resume with resume = latest, and run again"


class RunFiles:
    """Writes what a run leaves behind, and reads what it goes on from."""

    def __init__(
        self,
        resolved: Resolved,
        run: TrainingRun,
        root: Path,
        spare_folders: Sequence[Path],
        warn: Callable[[str], None],
    ) -> None:
        """root: what messages name the run's folder from. spare_folders: where a LoRA goes that
        finds no room in its own. warn: says what went wrong without ending the run."""
        self._resolved = resolved
        self._job = resolved.job
        self._run = run
        self._root = root
        self._spare_folders = spare_folders
        self._warn = warn
        self.finished: Path | None = None
        """The finished adapter, once there is one."""
        self._started = datetime.now()
        self._shadows = (
            Shadows(live_tensors(run.network)) if self._job.checkpointing.ema_shadows else None
        )
        self.saver = Saver(
            resolved.folder,
            self._job.name,
            self._job.checkpointing,
            self._write,
            resolved.identity,
            self._extra_state,
        )

    def resume(self, state_file: Path) -> None:
        """Put run, shadows and checkpoints where the state left them; ValueError if not its own."""
        rest = resumed(self._run, state_file, self.saver.identity)
        if self._shadows:
            try:
                self._shadows.load_state_dict(rest.get("shadows"))
            except ValueError as error:
                raise ValueError(f"resume: {state_file.name}: {error}") from error
        self.saver.continued(self._run)

    def warn_if_tight(self) -> None:
        """Say so where the files still to come will not all fit."""
        remaining = self._run.plan.steps - self._run.step
        needed = room_needed(
            self._resolved.parameters,
            self._job.checkpointing,
            remaining,
            shadows=len(SIGMA_RELS),
            filed_parameters=self._resolved.filed_parameters,
        )
        if text := tight(needed, self.saver.folder):
            self._warn(text)

    def shadowed(self, steps: Iterator[TrainingStep]) -> Iterator[TrainingStep]:
        """The steps, with the shadows, if any are kept, following what would be saved.

        Of a schedule-free optimizer that is its average, not what it trains.
        """
        for step in steps:
            if self._shadows and self._shadows.is_due(step.step):
                with self._run.optimization.in_eval_mode():
                    self._shadows.update(step.step)
            yield step

    def rescue(self) -> str:
        """Save what there is, and say where, without hiding why the run stopped."""
        saver, run = self.saver, self._run
        if saver.has_saved(run.step):
            return f"it is saved in {self._where}. {GO_ON}"
        try:
            path = saver.save_adapter(run)
        except NotWrittenError as error:
            return f"saving failed ({error}); {self._what_is_left()}"
        try:
            saver.save_state(run)
        except (NotWrittenError, ValueError) as error:
            return f"saved {path.name} in {self._where}, but no state to go on from ({error})"
        saver.prune(run)
        return f"saved {path.name} and its state in {self._where}. {GO_ON}"

    @property
    def _where(self) -> str:
        return os.path.relpath(self.saver.folder, self._root).replace(os.sep, "/")

    def _what_is_left(self) -> str:
        """Of a run that stopped where nothing could be saved."""
        step, spare = self.saver.last_saved, self._saved_elsewhere()
        kept = f"step {step} is the last saved, in {self._where}" if step else "nothing is saved"
        return f"the LoRA of this step is in {spare}; {kept}" if spare else kept

    def save_finished(self) -> AdapterStateDict:
        """The finished adapter, and its file.

        Where that cannot be written, a spare folder gets it, a warning says so, and the adapter is
        handed to the graph all the same.
        """
        saver, run = self.saver, self._run
        with run.optimization.in_eval_mode():
            lora = self._build(saver.metadata(run))
        try:
            self.finished = saver.save_final(run, self._warn)
        except NotWrittenError as error:
            spare = self.finished = self._saved_elsewhere()
            self._warn(
                f"the finished LoRA could not be saved in its folder ({error}). "
                + (f"It is in {spare}, and" if spare else "It is")
                + " at the node's output: save it with Save LoRA once there is room"
            )
        return lora

    def _saved_elsewhere(self) -> Path | None:
        """The adapter as it is in the first spare folder that takes it; None where none does."""
        for folder in self._spare_folders:
            with contextlib.suppress(OSError):
                path = free_folder(folder, self._job.name) / self.saver.final.name
                with self._run.optimization.in_eval_mode():
                    self._write(path, self.saver.metadata(self._run))
                return path
        return None

    def save_shadows(self) -> Path | None:
        """The shadow file beside the finished adapter; None without shadows, and, with a warning,
        when it cannot be written."""
        if self._shadows is None:
            return None
        with self._run.optimization.in_eval_mode():
            self._shadows.catch_up(self._run.step)
        built = self._build({"ss_steps": str(self._run.step)})
        constants = {key: tensor for key, tensor in built.items() if key.endswith(".alpha")}
        path = self.saver.folder / f"{self._job.name}{SHADOWS_SUFFIX}"
        try:
            filed = partial(as_filed, self._run.network)
            self._shadows.write(path, constants, built.metadata, filed)
        except NotWrittenError as error:
            self._warn(f"the EMA shadows could not be saved ({error})")
            return None
        return path

    def checkpoints(self, shadows: Path | None) -> Checkpoints:
        """Every kept file of the run, oldest first."""
        return Checkpoints(files=self.saver.checkpoints().files, shadows=shadows)

    def _extra_state(self) -> dict[str, Any]:
        return {"shadows": self._shadows.state_dict()} if self._shadows else {}

    def _write(self, path: Path, extra: Mapping[str, str]) -> None:
        built = self._build(extra)
        write_adapter(path, built, built.metadata)

    def _build(self, extra: Mapping[str, str]) -> AdapterStateDict:
        """A copy of the network as it is, as a LORA_MODEL with the metadata of its file."""
        job, architecture = self._job, self._resolved.architecture
        metadata = adapter_metadata(
            job.network,
            architecture,
            title=job.name,
            created=datetime.now(),
            training=musubi_fields(self._resolved, self._started),
            timestep_range=timestep_range(job.timesteps),
        )
        metadata["braid_config"] = json.dumps(self._resolved.record())
        state = state_dict_of(self._run.network, architecture)
        copied = {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()}
        return AdapterStateDict(copied, {**metadata, **extra})


def check_writable(folder: Path, parameters: int) -> None:
    """ValueError now rather than after an hour of training; leaves nothing behind.

    `parameters`: numbers of the adapter, for which there must be room.
    """
    probe, is_new = folder / "writable", not folder.exists()
    try:
        with replaced_when_whole(probe) as file:
            file.write(b"")
        probe.unlink()
        if is_new:
            folder.rmdir()
    except OSError as error:
        raise ValueError(
            f"the LoRA cannot be saved under {folder} ({error}); choose another output_name or "
            "free the folder"
        ) from error
    refuse_without_room(parameters, folder)
