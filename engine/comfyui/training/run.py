"""One LoRA training run inside the host, from sockets' contents to a saved adapter."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...ema.shadows import SIGMA_RELS
from ...network.attach import Network, attached, build_network, parameter_groups
from ...network.targets import TargetReport, select_targets
from ...refusals import said
from ...timesteps.sampling import TimestepSampling
from ...timesteps.stream import TimestepStream
from ...training.dataset import Dataset, TrainingItem
from ...training.job import TrainingJob
from ...training.logs import TrainingLogs, open_logs
from ...training.loop import TrainingRun, TrainingStep
from ...training.optimizers.optimizer import Optimization
from ...training.optimizers.rehearsal import rehearse
from ...training.states.saving import find_state, run_folder, saved
from ...training.validation import Validator, validated
from ..differentiable.compilation import Compiled, compiled, compiled_steps
from ..differentiable.denoiser import ComfyDenoiser, training_session
from ..model import architecture_of, diffusion_model_of, has_fp8_weights
from ..progress import reported
from .files import RunFiles, check_writable
from .inputs import TrainingInputs
from .items import Pair
from .live_picture import LivePicture
from .memory import MemoryEstimate, estimate_memory, refuse_if_too_large
from .preview import Previewer, previewed
from .records import Outcome, Resolved

logger = logging.getLogger("comfyui_braid.training")

MOST_WARNINGS = 50
"""In a report; on a full disk every checkpoint gives one."""
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class RunWarnings:
    """Says at the node, logs, and keeps for the report what goes wrong without ending a run."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.texts: list[str] = []
        self._say = say

    def __call__(self, text: str) -> None:
        logger.warning(text)
        self._say(text)
        if len(self.texts) < MOST_WARNINGS:
            self.texts.append(text)


def train_lora(job: TrainingJob, inputs: TrainingInputs, say: Callable[[str], None]) -> Outcome:
    """Train; whatever ends the run early, what was learned is saved first.

    `say` shows one line of text at the node.
    """
    patcher, warn = inputs.patcher, RunWarnings(say)
    targets = _select_targets(job, patcher)
    estimate = _estimate(job, inputs, targets)
    refuse_if_too_large(estimate)
    _rehearse(job, patcher, targets)
    state_file = find_state(inputs.loras, job.plan.output_name, job.checkpointing.resume)
    folder = run_folder(inputs.loras, job.plan.output_name, state_file)
    check_writable(folder, targets.parameters)
    with ExitStack() as stack:
        denoiser, compilation = _open_session(stack, job, inputs)
        items = _prepare(denoiser, inputs.pairs, job.timesteps)
        held_out = _prepare(denoiser, inputs.held_out, job.timesteps)
        network = build_network(
            targets.selected, job.network, job.plan.seed, _compute_dtype(job, patcher)
        ).to(denoiser.device)
        stack.enter_context(attached(denoiser.diffusion_model, network))
        run = _build_run(job, denoiser, network, items)
        resolved = _resolved(job, patcher, targets, run, estimate, folder)
        files = RunFiles(resolved, run, inputs.spare_folders, warn)
        if state_file:
            files.resume(state_file)
            say(f"resumed at step {run.step} from {state_file.name}")
        files.warn_if_tight()
        steps = files.shadowed(compiled_steps(run, compilation))
        if job.validation:
            steps = validated(steps, run, Validator(held_out, job.validation))
        steps = saved(steps, run, files.saver, warn)
        steps = _watched(
            steps, run, resolved, _build_previewer(job, inputs, denoiser, folder), warn
        )
        _train(steps, run, files, say)
        lora, shadows = files.save_finished(), files.save_shadows()
    return Outcome(
        resolved=resolved,
        lora=lora,
        loss_map=run.history.loss_map(),
        checkpoints=files.checkpoints(shadows),
        file=files.finished,
        warnings=tuple(warn.texts),
        steps_done=run.step,
        seconds_per_step=run.seconds_per_step,
        first_step_seconds=run.first_step_seconds,
        compiled=compilation.state,
    )


def _select_targets(job: TrainingJob, patcher: ModelPatcher) -> TargetReport:
    targets = select_targets(diffusion_model_of(patcher), job.network, architecture_of(patcher))
    for warning in targets.warnings:
        logger.warning(warning)
    return targets


def _open_session(
    stack: ExitStack, job: TrainingJob, inputs: TrainingInputs
) -> tuple[ComfyDenoiser, Compiled]:
    """The MODEL, loaded and differentiable until `stack` is closed."""
    plan, patcher = job.plan, inputs.patcher
    # before the session, so that it is the blocks that are compiled, not their checkpointing
    compilation = stack.enter_context(compiled(diffusion_model_of(patcher), job.compilation))
    denoiser = stack.enter_context(
        training_session(
            patcher,
            compute_dtype=_compute_dtype(job, patcher),
            gradient_checkpointing=plan.gradient_checkpointing,
            guidance=plan.guidance,
            offload=plan.blocks_to_swap > 0,
            latents_shape=(plan.batch_size, *inputs.largest_latents),
        )
    )
    stack.enter_context(compilation.savable_weights(denoiser.diffusion_model))
    return denoiser, compilation


def _rehearse(job: TrainingJob, patcher: ModelPatcher, targets: TargetReport) -> None:
    """Try the optimizer out while the model is not loaded yet, on one layer of each kind."""
    layers = {target.shape.has_large_kernel: target for target in targets.selected}
    with torch.inference_mode(False):
        network = build_network(tuple(layers.values()), job.network, job.plan.seed)
        groups = parameter_groups(network.to(patcher.load_device), job.plan.learning_rate)
        rehearse(job.optimizer, groups, job.plan.steps)


def _compute_dtype(job: TrainingJob, patcher: ModelPatcher) -> torch.dtype:
    chosen = COMPUTE_DTYPES.get(job.plan.mixed_precision)
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
            is_cancel = isinstance(reason, comfy.model_management.InterruptProcessingException)
            why = "cancelled" if is_cancel else said(reason)
            text = f"stopped at step {run.step} ({why}); {files.rescue()}"
            logger.warning(text)
            say(text)
        raise


def _watched(
    steps: Iterator[TrainingStep],
    run: TrainingRun,
    resolved: Resolved,
    previewer: Previewer | None,
    warn: Callable[[str], None],
) -> Iterator[TrainingStep]:
    """The steps with previews, logs and the picture in the node around them."""
    job = resolved.job
    if previewer:
        steps = previewed(steps, run, previewer)
    if job.log:
        steps = _logged(steps, open_logs(job.log, resolved.record(), run, warn), previewer)
    remaining = job.plan.steps - run.step
    return reported(steps, remaining, picture=LivePicture(run, previewer))


def _build_previewer(
    job: TrainingJob, inputs: TrainingInputs, denoiser: ComfyDenoiser, folder: Path
) -> Previewer | None:
    if not (job.preview and inputs.preview_sampling):
        return None
    positive = inputs.pairs[0][1]
    return Previewer(job.preview.every_n_steps, inputs.preview_sampling, denoiser, positive, folder)


def _logged(
    steps: Iterator[TrainingStep], logs: TrainingLogs, previewer: Previewer | None
) -> Iterator[TrainingStep]:
    """The steps; each is logged, and every new preview. The logs are closed at the end."""
    shown = None
    try:
        for step in steps:
            logs.record()
            if previewer and previewer.last is not shown:
                shown = previewer.last
                logs.record_image("sample", shown, step.step)
            yield step
    finally:
        logs.close()


def _build_run(
    job: TrainingJob, denoiser: ComfyDenoiser, network: Network, items: Sequence[TrainingItem]
) -> TrainingRun:
    groups = parameter_groups(network, job.plan.learning_rate)
    return TrainingRun(
        plan=job.plan,
        dataset=Dataset(items),
        denoiser=denoiser,
        network=network,
        timesteps=TimestepStream(job.timesteps, len(items), job.plan.seed),
        optimization=Optimization(job.optimizer, groups, job.plan.steps),
        device=denoiser.device,
    )


def _resolved(
    job: TrainingJob,
    patcher: ModelPatcher,
    targets: TargetReport,
    run: TrainingRun,
    estimate: MemoryEstimate,
    folder: Path,
) -> Resolved:
    return Resolved(
        job=job,
        architecture=targets.architecture,
        layers=[(target.name, target.shape) for target in targets.selected],
        parameters=targets.parameters,
        warnings=targets.warnings,
        optimizer=run.optimization.description,
        batches_per_epoch=run.batches_per_epoch,
        steps_per_epoch=run.steps_per_epoch,
        has_fp8_weights=has_fp8_weights(patcher),
        memory=estimate.text,
        folder=folder,
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


def _estimate(job: TrainingJob, inputs: TrainingInputs, targets: TargetReport) -> MemoryEstimate:
    return estimate_memory(
        inputs.patcher,
        parameters=targets.parameters,
        shadows=len(SIGMA_RELS) if job.checkpointing.ema_shadows else 0,
        batch_shape=(job.plan.batch_size, *inputs.largest_latents),
        gradient_checkpointing=job.plan.gradient_checkpointing,
        offload=job.plan.blocks_to_swap > 0,
    )
