"""LoraTraining: what one run is told, and what its files and reports say about it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ...network.spec import NetworkSpec
from ...network.targets import TargetReport
from ...timesteps.sampling import TimestepSampling
from ...training.loop import TrainingRun
from ...training.optimizer import OptimizerSpec
from ...training.options import Checkpointing, TrainingOptions
from ...training.plan import TrainingPlan
from ...training.saving import fingerprint
from ..model import file_name_of, has_fp8_weights
from .items import Pair


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

    @property
    def checkpointing(self) -> Checkpointing:
        return self.options.checkpointing or Checkpointing()

    @property
    def name(self) -> str:
        """Of the adapter file, without folders and ending."""
        return Path(self.plan.output_name).name


def musubi_fields(training: LoraTraining, run: TrainingRun, started: datetime) -> dict[str, object]:
    """The `ss_` fields of a run under musubi-tuner's names, and those it forgets."""
    plan, sampling, optimizer = training.plan, training.timesteps, training.optimizer
    patcher = run.denoiser.patcher
    base = file_name_of(patcher)
    return ({"sd_model_name": base} if base else {}) | {
        "session_id": int(started.timestamp() * 1e6) % 2**32,  # tells runs of one name apart
        "fp8_base": has_fp8_weights(patcher),
        "full_fp16": False,  # the adapter itself is always float32
        "full_bf16": False,
        "training_comment": None,
        "output_name": training.name,
        "learning_rate": plan.learning_rate,
        "num_train_items": len(run.dataset),
        "num_batches_per_epoch": run.batches_per_epoch,
        "num_epochs": -(-plan.steps // run.steps_per_epoch),
        "gradient_checkpointing": plan.gradient_checkpointing,
        "gradient_checkpointing_cpu_offload": False,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "max_train_steps": plan.steps,
        "lr_warmup_steps": optimizer.warmup_steps(plan.steps),
        "lr_scheduler": optimizer.lr_scheduler,
        "mixed_precision": plan.mixed_precision,
        "seed": plan.seed,
        "optimizer": run.optimization.description,
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


def timestep_range(sampling: TimestepSampling) -> tuple[int, int] | None:
    """modelspec.timestep_range, where it is not everything."""
    limits = (sampling.min_timestep, sampling.max_timestep)
    return None if limits == (0, 1000) else limits


def resolved(
    training: LoraTraining, run: TrainingRun, targets: TargetReport, folder: Path, memory: str
) -> dict[str, Any]:
    """The resolved configuration; plain JSON."""
    optimizer = training.optimizer
    return {
        "plan": asdict(training.plan),
        "network": asdict(training.network),
        "timesteps": asdict(training.timesteps),
        "optimizer": run.optimization.description,
        "lr_scheduler": optimizer.lr_scheduler,
        "lr_scheduler_args": dict(optimizer.lr_scheduler_args),
        "lr_warmup_steps": optimizer.warmup_steps(training.plan.steps),
        "architecture": targets.architecture.title,
        "modules": len(targets.selected),
        "parameters": targets.parameters,
        "warnings": list(targets.warnings),
        "items": len(training.pairs),
        "data": fingerprint(training.pairs),
        "memory": memory,
        "folder": str(folder),
    }


def public(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without paths of this machine."""
    return {key: value for key, value in report.items() if key not in ("folder", "file")}


def identity(training: LoraTraining, run: TrainingRun, targets: TargetReport) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run."""
    plan = training.plan
    layers = [(target.name, repr(target.shape)) for target in targets.selected]
    return {
        "network": repr(training.network),
        "architecture": targets.architecture.title,
        "adapted layers": f"{len(layers)} ({fingerprint(layers)})",
        "data": fingerprint(training.pairs),
        "timesteps": repr(training.timesteps),
        "optimizer": run.optimization.description,
        "lr_scheduler": training.optimizer.lr_scheduler,
        "lr_warmup_steps": training.optimizer.lr_warmup_steps,
        "lr_scheduler_args": repr(dict(training.optimizer.lr_scheduler_args)),
        "ema_shadows": training.checkpointing.ema_shadows,
        **{
            name: getattr(plan, name)
            for name in (
                "seed",
                "batch_size",
                "gradient_accumulation_steps",
                "learning_rate",
                "mixed_precision",
                "loss_type",
                "max_grad_norm",
                "scale_weight_norms",
                "guidance",
            )
        },
    }
