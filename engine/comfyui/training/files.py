"""The files of one run: its adapter, states and EMA shadows, and what they say of it."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ...checkpoints import SHADOWS_SUFFIX, AdapterStateDict, Checkpoints
from ...ema.shadows import Shadows
from ...files import read_header, read_tensors, replaced_when_whole
from ...network.attach import Network
from ...network.checkpoint import state_dict_of, weights_of, write_adapter
from ...network.keys import encoded
from ...network.metadata import adapter_metadata
from ...network.targets import TargetReport
from ...training.loop import TrainingRun, TrainingStep
from ...training.resume import resumed
from ...training.saving import Saver
from . import records
from .records import LoraTraining

logger = logging.getLogger("comfyui_braid.training")


class RunFiles:
    """Writes what a run leaves behind, and reads what it goes on from."""

    def __init__(
        self,
        training: LoraTraining,
        run: TrainingRun,
        targets: TargetReport,
        folder: Path,
        report: dict[str, Any],
    ) -> None:
        """report: the resolved configuration; where the adapter went is added to it."""
        self._training = training
        self._run = run
        self._architecture = targets.architecture
        self._report = report
        self._started = datetime.now()
        self._shadows = (
            _build_shadows(run.network, targets) if training.checkpointing.ema_shadows else None
        )
        self.saver = Saver(
            folder,
            training.name,
            training.checkpointing,
            self._write,
            records.identity(training, run, targets),
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

    def shadowed(self, steps: Iterator[TrainingStep]) -> Iterator[TrainingStep]:
        """The steps, with the shadows, if any are kept, following what would be saved.

        Of a schedule-free optimizer that is its average, not what it trains.
        """
        for step in steps:
            if self._shadows and self._shadows.is_due(step.step):
                with self._run.optimization.averaged():
                    self._shadows.update(step.step)
            yield step

    def rescue(self) -> str:
        """Save what there is, and say where, without hiding why the run stopped."""
        try:
            path = self.saver.save_step(self._run, with_state=True)
        except (OSError, ValueError) as error:
            return (
                f"saving failed ({error}); what was saved before is whole, in {self.saver.folder}"
            )
        return f"saved {path}; resume from the .state file beside it"

    def save_finished(self, say: Callable[[str], None]) -> AdapterStateDict:
        """The finished adapter, as it was read back from its file.

        Where it cannot be written it is handed to the graph all the same, and the report says so.
        """
        try:
            self.saver.save_final(self._run)
            self._report["file"] = str(self.saver.final)
            return read_lora(self.saver.final)
        except OSError as error:
            text = (
                f"the finished LoRA could not be saved ({error}); it is at the node's output: free "
                "some space and save it with Save LoRA"
            )
            logger.error(text)
            say(text)
            self._report["warnings"].append(text)
            with self._run.optimization.averaged():
                return self._build({})

    def save_shadows(self) -> Path | None:
        """The shadow file beside the finished adapter; None without shadows, and, with a warning,
        when it cannot be written."""
        if self._shadows is None:
            return None
        with self._run.optimization.averaged():
            self._shadows.catch_up(self._run.step)
        built = self._build({"ss_steps": str(self._run.step)})
        constants = {key: tensor for key, tensor in built.items() if key.endswith(".alpha")}
        path = self.saver.folder / f"{self._training.name}{SHADOWS_SUFFIX}"
        try:
            self._shadows.write(path, constants, built.metadata)
        except OSError as error:
            logger.warning("the EMA shadows could not be saved (%s)", error)
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
        """The network as it is, as a LORA_MODEL with the metadata of its file."""
        training = self._training
        metadata = adapter_metadata(
            training.network,
            self._architecture,
            title=training.name,
            created=datetime.now(),
            training=records.musubi_fields(training, self._run, self._started),
            timestep_range=records.timestep_range(training.timesteps),
        )
        metadata["braid_config"] = json.dumps(records.public(self._report))
        state = state_dict_of(self._run.network, self._architecture)
        on_cpu = {key: tensor.detach().cpu() for key, tensor in state.items()}
        return AdapterStateDict(on_cpu, {**metadata, **extra})


def _build_shadows(network: Network, targets: TargetReport) -> Shadows:
    """EMA shadows of the trained tensors, which they watch, under the keys of the adapter file."""
    live = encoded(weights_of(network), "comfyui", targets.architecture)
    return Shadows({key: tensor for key, tensor in live.items() if not key.endswith(".alpha")})


def check_writable(folder: Path) -> None:
    """ValueError now rather than after an hour of training; leaves nothing behind."""
    probe, is_new = folder / "writable", not folder.exists()
    try:
        with replaced_when_whole(probe) as temporary:
            temporary.write_bytes(b"")
        probe.unlink()
        if is_new:
            folder.rmdir()
    except OSError as error:
        raise ValueError(
            f"the LoRA cannot be saved under {folder} ({error.strerror or error}); "
            "choose another output_name or free the folder"
        ) from error


def read_lora(path: Path) -> AdapterStateDict:
    """A saved adapter as a LORA_MODEL."""
    return AdapterStateDict(read_tensors(path), read_header(path).metadata)
