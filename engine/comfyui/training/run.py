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
from ...network.spec import NetworkSpec
from ...network.targets import TargetReport, select_targets
from ...timesteps.stream import TimestepStream
from ...training.dataset import Dataset, TrainingItem
from ...training.job import TrainingJob
from ...training.logs import TrainingLogs, open_logs
from ...training.loop import TrainingRun, TrainingStep
from ...training.optimizers.optimizer import Optimization
from ...training.optimizers.rehearsal import rehearse
from ...training.options import Preview
from ...training.plan import TrainingPlan
from ...training.states.saving import find_state, run_folder, saved
from ...training.validation import Validator, validated
from ..differentiable.compilation import Compiled, compiled, compiled_steps
from ..differentiable.denoiser import ComfyDenoiser, training_session
from ..model import architecture_of, diffusion_model_of, has_fp8_weights
from ..progress import reported
from .files import RunFiles, check_writable
from .inputs import TrainingInputs
from .items import mixes_prompts, prepared
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
    targets = _select_targets(job.network, patcher)
    estimate = _estimate(job, inputs, targets)
    refuse_if_too_large(estimate)
    _rehearse(job, patcher, targets)
    state_file = find_state(inputs.loras, job.plan.output_name, job.checkpointing.resume)
    folder = run_folder(inputs.loras, job.plan.output_name, state_file)
    check_writable(folder, targets.filed_parameters)
    with ExitStack() as stack:
        denoiser, compilation = _open_session(stack, job, inputs)
        items = prepared(denoiser, inputs.pairs, job.timesteps)
        held_out = prepared(denoiser, inputs.held_out, job.timesteps)
        network = build_network(
            targets.selected, job.network, job.plan.seed, _compute_dtype(job.plan, patcher)
        ).to(denoiser.device)
        stack.enter_context(attached(denoiser.diffusion_model, network))
        run = _build_run(job, denoiser, network, items)
        resolved = _resolved(job, patcher, targets, run, estimate, folder, mixes_prompts(items))
        files = RunFiles(resolved, run, inputs.loras.parents[1], inputs.spare_folders, warn)
        started_at = _resume(run, files, state_file, say)
        files.warn_if_tight()
        steps = files.shadowed(compiled_steps(run, compilation))
        if job.validation:
            steps = validated(steps, run, Validator(held_out, job.validation))
        steps = saved(steps, run, files.saver, warn)
        steps = _watched(
            steps, run, resolved, _build_previewer(job.preview, inputs, denoiser, folder), warn
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
        forward_calls_per_step=denoiser.forward_calls / max(run.step - started_at, 1),
        compiled=compilation.state,
    )


def _select_targets(network: NetworkSpec, patcher: ModelPatcher) -> TargetReport:
    targets = select_targets(diffusion_model_of(patcher), network, architecture_of(patcher))
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
            compute_dtype=_compute_dtype(plan, patcher),
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


def _resume(
    run: TrainingRun, files: RunFiles, state_file: Path | None, say: Callable[[str], None]
) -> int:
    """Take the run to its state, if it has one; the steps that are done."""
    if state_file:
        files.resume(state_file)
        say(f"resumed at step {run.step} from {state_file.name}")
    return run.step


def _compute_dtype(plan: TrainingPlan, patcher: ModelPatcher) -> torch.dtype:
    chosen = COMPUTE_DTYPES.get(plan.mixed_precision)
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
            text = f"{_ended(reason)} at step {run.step}; {files.rescue()}"
            logger.warning(text)
            say(text)
        raise


def _ended(reason: BaseException) -> str:
    """How a run ended early; of an error the node says the rest."""
    if isinstance(reason, comfy.model_management.InterruptProcessingException):
        return "cancelled"
    return (
        "out of memory" if isinstance(reason, comfy.model_management.OOM_EXCEPTION) else "stopped"
    )


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
    preview: Preview | None, inputs: TrainingInputs, denoiser: ComfyDenoiser, folder: Path
) -> Previewer | None:
    if not (preview and inputs.preview_sampling):
        return None
    positive = inputs.pairs[0][1]
    return Previewer(preview.every_n_steps, inputs.preview_sampling, denoiser, positive, folder)


def _logged(
    steps: Iterator[TrainingStep], logs: TrainingLogs, previewer: Previewer | None
) -> Iterator[TrainingStep]:
    """The steps; each is logged, and every new preview. The logs are closed at the end."""
    shown = None
    try:
        for step in steps:
            logs.record()
            picture = previewer.last if previewer else None
            if picture is not None and picture is not shown:
                shown = picture
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
    mixes_prompts: bool,
) -> Resolved:
    return Resolved(
        job=job,
        architecture=targets.architecture,
        layers=[(target.name, target.shape) for target in targets.selected],
        parameters=targets.parameters,
        filed_parameters=targets.filed_parameters,
        warnings=targets.warnings,
        optimizer=run.optimization.description,
        batches_per_epoch=run.batches_per_epoch,
        steps_per_epoch=run.steps_per_epoch,
        has_fp8_weights=has_fp8_weights(patcher),
        memory=estimate.text,
        folder=folder,
        mixes_prompts=mixes_prompts,
    )


def _estimate(job: TrainingJob, inputs: TrainingInputs, targets: TargetReport) -> MemoryEstimate:
    return estimate_memory(
        inputs.patcher,
        parameters=targets.parameters,
        shadows=len(SIGMA_RELS) if job.checkpointing.ema_shadows else 0,
        batch_shape=(job.plan.batch_size, *inputs.largest_latents),
        gradient_checkpointing=job.plan.gradient_checkpointing,
        offload=job.plan.blocks_to_swap > 0,
    )
