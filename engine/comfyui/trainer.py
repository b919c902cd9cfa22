"""One LoRA training run inside the host, from sockets' contents to a saved adapter."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ..checkpoints import AdapterStateDict, Checkpoints
from ..files import replaced_when_whole
from ..network.attach import Network, attached, build_network, parameter_groups
from ..network.checkpoint import state_dict_of, write_adapter
from ..network.metadata import adapter_metadata
from ..network.spec import NetworkSpec
from ..network.targets import TargetReport, select_targets
from ..timesteps.sampling import TimestepSampling
from ..timesteps.stream import TimestepStream
from ..training.dataset import Dataset, TrainingItem
from ..training.figure import draw_history
from ..training.logs import TrainingLogs, open_logs
from ..training.loop import TrainingRun, TrainingStep
from ..training.optimizer import Optimization, OptimizerSpec
from ..training.options import Checkpointing, TrainingOptions
from ..training.plan import TrainingPlan
from ..training.saving import (
    Saver,
    dataset_fingerprint,
    find_state,
    free_folder,
    resumed,
    saved,
)
from ..training.validation import Validator, validated
from .compilation import compiled
from .denoiser import ComfyDenoiser, training_session
from .items import Pair
from .memory import estimate_memory, refuse_if_too_large
from .model import architecture_of, diffusion_model_of
from .preview import Previewer, previewed
from .progress import reported

logger = logging.getLogger("comfyui_braid.training")

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraTraining:
    """Everything that one run needs to know."""

    plan: TrainingPlan
    network: NetworkSpec
    timesteps: TimestepSampling
    optimizer: OptimizerSpec
    options: TrainingOptions
    pairs: Sequence[Pair]
    """The training items."""
    held_out: Sequence[Pair]
    """The items of `options.validation`."""
    loras: Path
    """The folder under which the run's own folder is made."""


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
    estimate = estimate_memory(
        patcher,
        parameters=targets.parameters,
        batch_shape=shape,
        gradient_checkpointing=plan.gradient_checkpointing,
        swapped_share=1.0 if plan.blocks_to_swap else 0.0,
    )
    refuse_if_too_large(estimate)
    checkpointing = training.options.checkpointing or Checkpointing()
    state_file = find_state(training.loras, plan.output_name, checkpointing.resume)
    folder = state_file.parent if state_file else free_folder(training.loras, plan.output_name)
    _check_writable(folder)
    dtype = COMPUTE_DTYPES.get(plan.mixed_precision) or patcher.model_dtype()
    with ExitStack() as stack:
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
        stack.enter_context(compiled(denoiser.diffusion_model, training.options.compilation))
        network = build_network(targets.selected, training.network, plan.seed, dtype)
        network.to(denoiser.device)
        stack.enter_context(attached(denoiser.diffusion_model, network))
        run = _build_run(training, denoiser, network)
        report = _report(training, targets, folder, estimate.text)
        saver = Saver(
            folder,
            Path(plan.output_name).name,
            checkpointing,
            _adapter_writer(training, network, targets, run, report),
            _identity(training, targets, run.dataset),
        )
        if state_file:
            resumed(run, state_file, saver.identity)
            saver.continued(run)
            say(f"resumed at step {run.step} from {state_file.name}")
        steps = _with_options(run, training, denoiser, saver, stack, report)
        _train(steps, run, saver, say)
        saver.save_final(run)
    report |= {"file": str(saver.final), "steps_done": run.step}
    return TrainedLora(
        lora=read_lora(saver.final),
        loss_map=run.history.loss_map(),
        checkpoints=saver.checkpoints(),
        report=report,
    )


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
            path = saver.save_step(run, with_state=True)
            text = f"stopped at step {run.step} ({type(reason).__name__}); saved {path}"
            logger.warning("%s; resume from the .state file beside it", text)
            say(text)
        raise


def _with_options(
    run: TrainingRun,
    training: LoraTraining,
    denoiser: ComfyDenoiser,
    saver: Saver,
    stack: ExitStack,
    report: Mapping[str, Any],
) -> Iterator[TrainingStep]:
    """The run's steps with validation, saving, previews, logs and progress around them."""
    options = training.options
    steps, previewer = run.steps(), None
    if options.validation:
        steps = validated(steps, run, _build_validator(training, denoiser))
    steps = saved(steps, run, saver)
    if options.preview:
        previewer = Previewer(options.preview, denoiser, training.pairs[0][1], saver.folder)
        steps = previewed(steps, run, previewer)
    if options.log:
        logs = open_logs(options.log, _public(report), run.optimization.group_names)
        stack.callback(logs.close)
        steps = _logged(steps, run, logs, previewer)
    remaining = run.plan.steps - run.step
    return reported(steps, remaining, picture=_Picture(run, previewer))


@dataclass(slots=True)
class _Picture:
    """The node's live picture: the loss curve, and the last preview beside it."""

    run: TrainingRun
    previewer: Previewer | None

    def __call__(self, step: TrainingStep) -> Image.Image:
        run = self.run
        average = run.history.average(run.steps_per_epoch)
        return draw_history(
            run.history,
            steps=run.plan.steps,
            sample=self.previewer.last if self.previewer else None,
            caption=f"step {step.step} of {run.plan.steps} · average loss {average:.4g} · "
            f"{step.seconds:.2f} s a step",
        )


def _logged(
    steps: Iterator[TrainingStep], run: TrainingRun, logs: TrainingLogs, previewer: Previewer | None
) -> Iterator[TrainingStep]:
    shown, validations = None, len(run.history.validations)
    for step in steps:
        logs.record_step(step, run)
        for record in run.history.validations[validations:]:
            logs.record_validation(record)
        validations = len(run.history.validations)
        if previewer and previewer.last is not shown:
            shown = previewer.last
            logs.record_image("sample", shown, step.step)
        yield step


def _build_run(training: LoraTraining, denoiser: ComfyDenoiser, network: Network) -> TrainingRun:
    dataset = Dataset(_prepare(denoiser, training.pairs))
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


def _prepare(denoiser: ComfyDenoiser, pairs: Sequence[Pair]) -> list[TrainingItem]:
    items = []
    for samples, positive in pairs:
        latents, conditioning = denoiser.prepare(samples, positive)
        items.append(
            TrainingItem(
                latents=latents[0],
                conditioning=conditioning,
                batch_key=(tuple(latents.shape[1:]), conditioning.key),
            )
        )
    return items


def _build_validator(training: LoraTraining, denoiser: ComfyDenoiser) -> Validator:
    validation = training.options.validation
    return Validator(
        _prepare(denoiser, training.held_out),
        every_n_steps=validation.every_n_steps,
        timesteps_per_item=validation.timesteps_per_item,
        seed=validation.seed,
    )


def _adapter_writer(
    training: LoraTraining,
    network: Network,
    targets: TargetReport,
    run: TrainingRun,
    report: Mapping[str, Any],
) -> Callable[[Path, Mapping[str, str]], None]:
    started = datetime.now()

    def write(path: Path, extra: Mapping[str, str]) -> None:
        metadata = adapter_metadata(
            training.network,
            targets.architecture,
            title=Path(training.plan.output_name).name,
            created=datetime.now(),
            training=_musubi_fields(training, run, started),
            timestep_range=_timestep_range(training.timesteps),
        )
        metadata["braid_config"] = json.dumps(_public(report))
        state = _on_cpu(state_dict_of(network, targets.architecture))
        write_adapter(path, state, {**metadata, **extra})

    return write


def _musubi_fields(
    training: LoraTraining, run: TrainingRun, started: datetime
) -> dict[str, object]:
    """The `ss_` fields of a run under musubi-tuner's names, and those it forgets."""
    plan, sampling, optimizer = training.plan, training.timesteps, training.optimizer
    return {
        "output_name": Path(plan.output_name).name,
        "learning_rate": plan.learning_rate,
        "num_train_items": len(run.dataset),
        "num_batches_per_epoch": run.batches_per_epoch,
        "num_epochs": -(-plan.steps // run.steps_per_epoch),
        "gradient_checkpointing": plan.gradient_checkpointing,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "max_train_steps": plan.steps,
        "lr_warmup_steps": optimizer.warmup_steps(plan.steps),
        "lr_scheduler": optimizer.lr_scheduler,
        "mixed_precision": plan.mixed_precision,
        "seed": plan.seed,
        "optimizer": optimizer.description,
        "max_grad_norm": plan.max_grad_norm,
        "scale_weight_norms": plan.scale_weight_norms or None,
        "guidance_scale": plan.guidance,
        "loss_type": plan.loss_type,
        "timestep_sampling": sampling.mode,
        "weighting_scheme": sampling.weighting_scheme,
        "logit_mean": sampling.logit_mean,
        "logit_std": sampling.logit_std,
        "mode_scale": sampling.mode_scale,
        "sigmoid_scale": sampling.sigmoid_scale,
        "discrete_flow_shift": sampling.discrete_flow_shift,
        "min_timestep": sampling.min_timestep,
        "max_timestep": sampling.max_timestep,
        "preserve_distribution_shape": sampling.preserve_distribution_shape,
        "num_timestep_buckets": sampling.num_timestep_buckets,
        "datasets": [{"batch_size": plan.batch_size}],
        "training_started_at": started.timestamp(),
        "training_finished_at": datetime.now().timestamp(),
    }


def _timestep_range(sampling: TimestepSampling) -> tuple[int, int] | None:
    limits = (sampling.min_timestep, sampling.max_timestep)
    return None if limits == (0, 1000) else limits


def _report(
    training: LoraTraining, targets: TargetReport, folder: Path, memory: str
) -> dict[str, Any]:
    """The resolved configuration; plain JSON."""
    return {
        "plan": asdict(training.plan),
        "network": asdict(training.network),
        "timesteps": asdict(training.timesteps),
        "optimizer": training.optimizer.description,
        "lr_scheduler": training.optimizer.lr_scheduler,
        "lr_warmup_steps": training.optimizer.warmup_steps(training.plan.steps),
        "architecture": targets.architecture.title,
        "modules": len(targets.selected),
        "parameters": targets.parameters,
        "warnings": list(targets.warnings),
        "items": len(training.pairs),
        "memory": memory,
        "folder": str(folder),
    }


def _public(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without paths of this machine."""
    return {key: value for key, value in report.items() if key not in ("folder", "file")}


def _identity(training: LoraTraining, targets: TargetReport, dataset: Dataset) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run."""
    plan = training.plan
    return {
        "network": repr(training.network),
        "modules": len(targets.selected),
        "data": dataset_fingerprint(dataset),
        "timesteps": repr(training.timesteps),
        "optimizer": training.optimizer.description,
        "lr_scheduler": training.optimizer.lr_scheduler,
        "seed": plan.seed,
        "batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "learning_rate": plan.learning_rate,
        "loss_type": plan.loss_type,
    }


def _largest_batch(pairs: Sequence[Pair], batch_size: int) -> tuple[int, ...]:
    largest = max((samples for samples, _ in pairs), key=lambda samples: samples.numel())
    return (batch_size, *largest.shape[1:])


def _check_writable(folder: Path) -> None:
    """ValueError now rather than after an hour of training."""
    probe = folder / "writable"
    try:
        with replaced_when_whole(probe) as temporary:
            temporary.write_bytes(b"")
        probe.unlink()
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


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu() for key, tensor in state.items()}
