"""One LoRA training run inside the host, from sockets' contents to a saved adapter."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image

from ..checkpoints import SHADOWS_SUFFIX, AdapterStateDict, Checkpoints
from ..ema.shadows import SIGMA_RELS, Shadows
from ..files import replaced_when_whole
from ..network.attach import Network, attached, build_network, parameter_groups
from ..network.checkpoint import state_dict_of, weights_of, write_adapter
from ..network.keys import encoded
from ..network.metadata import adapter_metadata
from ..network.targets import TargetReport, select_targets
from ..timesteps.sampling import TimestepSampling
from ..timesteps.stream import TimestepStream
from ..training.dataset import Dataset, TrainingItem
from ..training.figure import draw_history
from ..training.logs import TrainingLogs, open_logs
from ..training.loop import TrainingRun, TrainingStep
from ..training.optimizer import Optimization
from ..training.saving import Saver, find_state, resumed, run_folder, saved
from ..training.validation import Validator, validated
from . import lora_training
from .compilation import compiled, compiled_steps
from .denoiser import ComfyDenoiser, training_session
from .items import Pair
from .lora_training import LoraTraining
from .memory import MemoryEstimate, estimate_memory, refuse_if_too_large
from .model import architecture_of, diffusion_model_of
from .preview import Previewer, previewed
from .progress import reported

logger = logging.getLogger("comfyui_braid.training")

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DRAWING_SHARE = 0.01
"""Largest share of the time that goes into drawing the live loss curve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedLora:
    """What a finished run hands to the graph."""

    lora: AdapterStateDict
    """A LORA_MODEL: tensors under ComfyUI's keys, with the file's metadata."""
    loss_map: dict[str, Any]
    checkpoints: Checkpoints
    report: dict[str, Any]
    """The resolved configuration and what came of it; JSON."""


def train_lora(
    patcher: ModelPatcher, training: LoraTraining, say: Callable[[str], None]
) -> TrainedLora:
    """Train; whatever ends the run early, what was learned is saved first.

    `say` shows one line of text at the node.
    """
    plan = training.plan
    targets = select_targets(
        diffusion_model_of(patcher), training.network, architecture_of(patcher)
    )
    for warning in targets.warnings:
        logger.warning(warning)
    shape = _largest_batch(training.pairs, plan.batch_size)
    estimate = _estimate(patcher, training, targets, shape)
    refuse_if_too_large(estimate)
    state_file = find_state(training.loras, plan.output_name, training.checkpointing.resume)
    folder = run_folder(training.loras, plan.output_name, state_file)
    _check_writable(folder)
    dtype = COMPUTE_DTYPES.get(plan.mixed_precision) or patcher.model.get_dtype_inference()
    with ExitStack() as stack:
        # before the session, so that it is the blocks that are compiled, not their checkpointing
        compilation = stack.enter_context(
            compiled(diffusion_model_of(patcher), training.options.compilation)
        )
        denoiser = stack.enter_context(
            training_session(
                patcher,
                compute_dtype=dtype,
                gradient_checkpointing=plan.gradient_checkpointing,
                guidance=plan.guidance,
                offload=plan.blocks_to_swap > 0,
                latents_shape=shape,
            )
        )
        stack.enter_context(compilation.savable_weights(denoiser.diffusion_model))
        network = build_network(targets.selected, training.network, plan.seed, dtype)
        network.to(denoiser.device)
        stack.enter_context(attached(denoiser.diffusion_model, network))
        run = _build_run(training, denoiser, network)
        report = lora_training.resolved(training, run, targets, folder, estimate.text)
        adapter = _Adapter(training, network, targets, run, report)
        shadows = _build_shadows(network, targets) if training.checkpointing.ema_shadows else None
        saver = Saver(
            folder,
            training.name,
            training.checkpointing,
            adapter.write,
            lora_training.identity(training, run, targets),
            (lambda: {"shadows": shadows.state_dict()}) if shadows else dict,
        )
        if state_file:
            rest = resumed(run, state_file, saver.identity)
            if shadows:
                shadows.load_state_dict(rest["shadows"])
            saver.continued(run)
            say(f"resumed at step {run.step} from {state_file.name}")
        steps = compiled_steps(run, compilation)
        if shadows:
            steps = _shadowed(steps, run, shadows)
        steps = _with_options(steps, run, training, denoiser, saver, stack, report)
        _train(steps, run, saver, say)
        lora = _save_finished(saver, adapter, report, say)
        shadow_file = _save_shadows(shadows, adapter, folder) if shadows else None
    report |= {
        "steps_done": run.step,
        "seconds_per_step": _seconds(run.seconds_per_step),
        "first_step_seconds": _seconds(run.first_step_seconds),
        "compiled": compilation.state,
    }
    return TrainedLora(
        lora=lora,
        loss_map=run.history.loss_map(),
        checkpoints=Checkpoints(files=saver.checkpoints().files, shadows=shadow_file),
        report=report,
    )


def _seconds(seconds: float) -> float | None:
    """For the report; None where no step was made."""
    return None if math.isnan(seconds) else round(seconds, 4)


@dataclass(frozen=True, slots=True)
class _Adapter:
    """The network of a run as a LORA_MODEL or a file."""

    training: LoraTraining
    network: Network
    targets: TargetReport
    run: TrainingRun
    report: Mapping[str, Any]
    started: datetime = field(default_factory=datetime.now)

    def build(self, extra: Mapping[str, str]) -> AdapterStateDict:
        training = self.training
        metadata = adapter_metadata(
            training.network,
            self.targets.architecture,
            title=training.name,
            created=datetime.now(),
            training=lora_training.musubi_fields(training, self.run, self.started),
            timestep_range=lora_training.timestep_range(training.timesteps),
        )
        metadata["braid_config"] = json.dumps(lora_training.public(self.report))
        state = state_dict_of(self.network, self.targets.architecture)
        on_cpu = {key: tensor.detach().cpu() for key, tensor in state.items()}
        return AdapterStateDict(on_cpu, {**metadata, **extra})

    def write(self, path: Path, extra: Mapping[str, str]) -> None:
        built = self.build(extra)
        write_adapter(path, built, built.metadata)


def _train(
    steps: Iterator[TrainingStep], run: TrainingRun, saver: Saver, say: Callable[[str], None]
) -> None:
    """Exhaust the steps; on cancel, error or divergence save adapter and state, then pass it on."""
    started_at = run.step
    try:
        for _ in steps:
            pass
    except BaseException as reason:
        if run.step > started_at:
            text = f"stopped at step {run.step} ({type(reason).__name__}); {_rescued(run, saver)}"
            logger.warning(text)
            say(text)
        raise


def _rescued(run: TrainingRun, saver: Saver) -> str:
    """Save what there is, and say where, without hiding why the run stopped."""
    try:
        path = saver.save_step(run, with_state=True)
    except (OSError, ValueError) as error:
        return f"saving failed ({error}); what was saved before is whole, in {saver.folder}"
    return f"saved {path}; resume from the .state file beside it"


def _save_finished(
    saver: Saver, adapter: _Adapter, report: dict[str, Any], say: Callable[[str], None]
) -> AdapterStateDict:
    """The finished adapter, as it was read back from its file.

    Where it cannot be written it is handed to the graph all the same, and the report says so.
    """
    try:
        saver.save_final(adapter.run)
        report["file"] = str(saver.final)
        return read_lora(saver.final)
    except OSError as error:
        text = (
            f"the finished LoRA could not be saved ({error}); it is at the node's output: free "
            "some space and save it with Save LoRA"
        )
        logger.error(text)
        say(text)
        report["warnings"].append(text)
        with adapter.run.optimization.averaged():
            return adapter.build({})


def _build_shadows(network: Network, targets: TargetReport) -> Shadows:
    """EMA shadows of the trained tensors, which they watch, under the keys of the adapter file."""
    live = encoded(weights_of(network), "comfyui", targets.architecture)
    return Shadows({key: tensor for key, tensor in live.items() if not key.endswith(".alpha")})


def _shadowed(
    steps: Iterator[TrainingStep], run: TrainingRun, shadows: Shadows
) -> Iterator[TrainingStep]:
    """Average what would be saved: of a schedule-free optimizer its average, not what it trains."""
    for step in steps:
        if shadows.is_due(step.step):
            with run.optimization.averaged():
                shadows.update(step.step)
        yield step


def _save_shadows(shadows: Shadows, adapter: _Adapter, folder: Path) -> Path | None:
    """The shadow file beside the final adapter; None, with a warning, when it cannot be written."""
    with adapter.run.optimization.averaged():
        shadows.catch_up(adapter.run.step)
    built = adapter.build({"ss_steps": str(adapter.run.step)})
    constants = {key: tensor for key, tensor in built.items() if key.endswith(".alpha")}
    path = folder / f"{adapter.training.name}{SHADOWS_SUFFIX}"
    try:
        shadows.write(path, constants, built.metadata)
    except OSError as error:
        logger.warning("the EMA shadows could not be saved (%s)", error)
        return None
    return path


def _with_options(
    steps: Iterator[TrainingStep],
    run: TrainingRun,
    training: LoraTraining,
    denoiser: ComfyDenoiser,
    saver: Saver,
    stack: ExitStack,
    report: Mapping[str, Any],
) -> Iterator[TrainingStep]:
    """The steps with validation, saving, previews, logs and progress around them."""
    options, previewer = training.options, None
    if options.validation:
        steps = validated(steps, run, _build_validator(training, denoiser))
    steps = saved(steps, run, saver)
    if options.preview:
        previewer = Previewer(options.preview, denoiser, training.pairs[0][1], saver.folder)
        steps = previewed(steps, run, previewer)
    if options.log:
        logs = open_logs(options.log, lora_training.public(report), run)
        stack.callback(logs.close)
        steps = _logged(steps, logs, previewer)
    remaining = run.plan.steps - run.step
    return reported(steps, remaining, picture=_Picture(run, previewer))


@dataclass(slots=True)
class _Picture:
    """The node's live picture: the loss curve, and the last preview beside it."""

    run: TrainingRun
    previewer: Previewer | None
    _shown: np.ndarray | None = None
    _next_at: float = 0.0
    _warm: bool = False

    def __call__(self, step: TrainingStep) -> Image.Image | None:
        """None, to leave the shown one, where drawing would take too large a share of the time."""
        run, now = self.run, time.perf_counter()
        sample = self.previewer.last if self.previewer else None
        if now < self._next_at and sample is self._shown and step.step < run.plan.steps:
            return None
        self._shown = sample
        picture = draw_history(
            run.history,
            steps=run.plan.steps,
            sample=sample,
            caption=f"step {step.step} of {run.plan.steps} · average loss "
            f"{run.history.average(run.steps_per_epoch):.4g} · {run.seconds_per_step:.2f} s a step",
        )
        drawn = time.perf_counter()
        if self._warm:  # the first picture also loads matplotlib: its time says nothing
            self._next_at = drawn + (drawn - now) / DRAWING_SHARE
        self._warm = True
        return picture


def _logged(
    steps: Iterator[TrainingStep], logs: TrainingLogs, previewer: Previewer | None
) -> Iterator[TrainingStep]:
    shown = None
    for step in steps:
        logs.record()
        if previewer and previewer.last is not shown:
            shown = previewer.last
            logs.record_image("sample", shown, step.step)
        yield step


def _build_run(training: LoraTraining, denoiser: ComfyDenoiser, network: Network) -> TrainingRun:
    dataset = Dataset(_prepare(denoiser, training.pairs, training.timesteps))
    groups = parameter_groups(network, training.plan.learning_rate)
    return TrainingRun(
        plan=training.plan,
        dataset=dataset,
        denoiser=denoiser,
        network=network,
        timesteps=TimestepStream(training.timesteps, len(dataset), training.plan.seed),
        optimization=Optimization(training.optimizer, groups, training.plan.steps),
        device=denoiser.device,
    )


def _prepare(
    denoiser: ComfyDenoiser, pairs: Sequence[Pair], sampling: TimestepSampling
) -> list[TrainingItem]:
    """The items as the loop takes them; ValueError for what the model or the noise levels do not
    fit."""
    prepared = [denoiser.prepare(samples, positive) for samples, positive in pairs]
    denoiser.check(prepared)
    for height, width in {latents.shape[-2:] for latents, _ in prepared}:
        sampling.distribution(height, width)
    return [
        TrainingItem(
            latents=latents[0],
            conditioning=conditioning,
            batch_key=(tuple(latents.shape[1:]), conditioning.key),
        )
        for latents, conditioning in prepared
    ]


def _build_validator(training: LoraTraining, denoiser: ComfyDenoiser) -> Validator:
    validation = training.options.validation
    return Validator(
        _prepare(denoiser, training.held_out, training.timesteps),
        every_n_steps=validation.every_n_steps,
        timesteps_per_item=validation.timesteps_per_item,
        seed=validation.seed,
    )


def _estimate(
    patcher: ModelPatcher,
    training: LoraTraining,
    targets: TargetReport,
    batch_shape: Sequence[int],
) -> MemoryEstimate:
    return estimate_memory(
        patcher,
        parameters=targets.parameters,
        shadows=len(SIGMA_RELS) if training.checkpointing.ema_shadows else 0,
        batch_shape=batch_shape,
        gradient_checkpointing=training.plan.gradient_checkpointing,
        offload=training.plan.blocks_to_swap > 0,
    )


def _largest_batch(pairs: Sequence[Pair], batch_size: int) -> tuple[int, ...]:
    largest = max((samples for samples, _ in pairs), key=lambda samples: samples.numel())
    return (batch_size, *largest.shape[1:])


def _check_writable(folder: Path) -> None:
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
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return AdapterStateDict(tensors, file.metadata() or {})
