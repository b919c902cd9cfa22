"""One LoRA training run inside the host, from sockets' contents to a saved adapter."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...checkpoints import AdapterStateDict, Checkpoints
from ...ema.shadows import SIGMA_RELS
from ...network.attach import Network, attached, build_network, parameter_groups
from ...network.targets import TargetReport, select_targets
from ...timesteps.sampling import TimestepSampling
from ...timesteps.stream import TimestepStream
from ...training.dataset import Dataset, TrainingItem
from ...training.logs import TrainingLogs, open_logs
from ...training.loop import TrainingRun, TrainingStep
from ...training.optimizer import Optimization
from ...training.rehearsal import rehearse
from ...training.saving import find_state, run_folder, saved
from ...training.validation import Validator, validated
from ..differentiable.compilation import Compiled, compiled, compiled_steps
from ..differentiable.denoiser import ComfyDenoiser, training_session
from ..model import architecture_of, diffusion_model_of
from ..progress import reported
from . import records
from .files import RunFiles, check_writable
from .items import Pair
from .live_picture import LivePicture
from .memory import MemoryEstimate, estimate_memory, refuse_if_too_large
from .preview import Previewer, previewed
from .records import LoraTraining

logger = logging.getLogger("comfyui_braid.training")

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    estimate = _estimate(patcher, training, targets)
    refuse_if_too_large(estimate)
    _rehearse(patcher, training, targets)
    state_file = find_state(training.loras, plan.output_name, training.checkpointing.resume)
    folder = run_folder(training.loras, plan.output_name, state_file)
    check_writable(folder)
    with ExitStack() as stack:
        denoiser, compilation = _open_session(stack, patcher, training)
        items = _prepare(denoiser, training.pairs, training.timesteps)
        held_out = _prepare(denoiser, training.held_out, training.timesteps)
        network = build_network(
            targets.selected, training.network, plan.seed, _compute_dtype(patcher, training)
        ).to(denoiser.device)
        stack.enter_context(attached(denoiser.diffusion_model, network))
        run = _build_run(training, denoiser, network, items)
        report = records.resolved(training, run, targets, folder, estimate.text)
        files = RunFiles(training, run, targets, folder, report)
        if state_file:
            files.resume(state_file)
            say(f"resumed at step {run.step} from {state_file.name}")
        steps = files.shadowed(compiled_steps(run, compilation))
        steps = _with_options(steps, run, training, held_out, files, stack, report)
        _train(steps, run, files, say)
        lora, shadows = files.save_finished(say), files.save_shadows()
    report |= {
        "steps_done": run.step,
        "seconds_per_step": _seconds(run.seconds_per_step),
        "first_step_seconds": _seconds(run.first_step_seconds),
        "compiled": compilation.state,
    }
    return TrainedLora(
        lora=lora,
        loss_map=run.history.loss_map(),
        checkpoints=files.checkpoints(shadows),
        report=report,
    )


def _seconds(seconds: float) -> float | None:
    """For the report; None where no step was made."""
    return None if math.isnan(seconds) else round(seconds, 4)


def _open_session(
    stack: ExitStack, patcher: ModelPatcher, training: LoraTraining
) -> tuple[ComfyDenoiser, Compiled]:
    """The MODEL, loaded and differentiable until `stack` is closed."""
    plan = training.plan
    # before the session, so that it is the blocks that are compiled, not their checkpointing
    compilation = stack.enter_context(
        compiled(diffusion_model_of(patcher), training.options.compilation)
    )
    denoiser = stack.enter_context(
        training_session(
            patcher,
            compute_dtype=_compute_dtype(patcher, training),
            gradient_checkpointing=plan.gradient_checkpointing,
            guidance=plan.guidance,
            offload=plan.blocks_to_swap > 0,
            latents_shape=_largest_batch(training),
        )
    )
    stack.enter_context(compilation.savable_weights(denoiser.diffusion_model))
    return denoiser, compilation


def _rehearse(patcher: ModelPatcher, training: LoraTraining, targets: TargetReport) -> None:
    """Try the optimizer out while the model is not loaded yet, on one layer of each kind."""
    layers = {target.shape.has_large_kernel: target for target in targets.selected}
    with torch.inference_mode(False):
        network = build_network(tuple(layers.values()), training.network, training.plan.seed)
        groups = parameter_groups(network.to(patcher.load_device), training.plan.learning_rate)
        rehearse(training.optimizer, groups, training.plan.steps)


def _compute_dtype(patcher: ModelPatcher, training: LoraTraining) -> torch.dtype:
    chosen = COMPUTE_DTYPES.get(training.plan.mixed_precision)
    return chosen or patcher.model.get_dtype_inference()


def _train(
    steps: Iterator[TrainingStep], run: TrainingRun, files: RunFiles, say: Callable[[str], None]
) -> None:
    """Exhaust the steps; on cancel, error or divergence save adapter and state, then pass it on."""
    started_at = run.step
    try:
        for _ in steps:
            pass
    except BaseException as reason:
        if run.step > started_at:
            text = f"stopped at step {run.step} ({type(reason).__name__}); {files.rescue()}"
            logger.warning(text)
            say(text)
        raise


def _with_options(
    steps: Iterator[TrainingStep],
    run: TrainingRun,
    training: LoraTraining,
    held_out: Sequence[TrainingItem],
    files: RunFiles,
    stack: ExitStack,
    report: Mapping[str, Any],
) -> Iterator[TrainingStep]:
    """The steps with validation, saving, previews, logs and progress around them."""
    options, previewer = training.options, None
    if options.validation:
        steps = validated(steps, run, _build_validator(training, held_out))
    steps = saved(steps, run, files.saver)
    if options.preview:
        folder, positive = files.saver.folder, training.pairs[0][1]
        previewer = Previewer(options.preview, run.denoiser, positive, folder)
        steps = previewed(steps, run, previewer)
    if options.log:
        logs = open_logs(options.log, records.public(report), run)
        stack.callback(logs.close)
        steps = _logged(steps, logs, previewer)
    remaining = run.plan.steps - run.step
    return reported(steps, remaining, picture=LivePicture(run, previewer))


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


def _build_run(
    training: LoraTraining,
    denoiser: ComfyDenoiser,
    network: Network,
    items: Sequence[TrainingItem],
) -> TrainingRun:
    groups = parameter_groups(network, training.plan.learning_rate)
    return TrainingRun(
        plan=training.plan,
        dataset=Dataset(items),
        denoiser=denoiser,
        network=network,
        timesteps=TimestepStream(training.timesteps, len(items), training.plan.seed),
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


def _build_validator(training: LoraTraining, held_out: Sequence[TrainingItem]) -> Validator:
    validation = training.options.validation
    return Validator(
        held_out,
        every_n_steps=validation.every_n_steps,
        timesteps_per_item=validation.timesteps_per_item,
        seed=validation.seed,
    )


def _estimate(
    patcher: ModelPatcher, training: LoraTraining, targets: TargetReport
) -> MemoryEstimate:
    return estimate_memory(
        patcher,
        parameters=targets.parameters,
        shadows=len(SIGMA_RELS) if training.checkpointing.ema_shadows else 0,
        batch_shape=_largest_batch(training),
        gradient_checkpointing=training.plan.gradient_checkpointing,
        offload=training.plan.blocks_to_swap > 0,
    )


def _largest_batch(training: LoraTraining) -> tuple[int, ...]:
    largest = max((samples for samples, _ in training.pairs), key=lambda samples: samples.numel())
    return (training.plan.batch_size, *largest.shape[1:])
