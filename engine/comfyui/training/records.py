"""What is known of a run before its first step, and what came of it after the last."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ...checkpoints import AdapterStateDict, Checkpoints
from ...network.architectures import Architecture
from ...timesteps.sampling import TimestepSampling
from ...training.job import TrainingJob
from ...training.states.identity import Identity, Layers, identity


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A job as the run will do it, with nothing left to be decided."""

    job: TrainingJob
    architecture: Architecture
    """The table row whose defaults and key names hold."""
    layers: Layers
    """The adapted layers."""
    parameters: int
    """Trainable numbers."""
    filed_parameters: int
    """Numbers of an adapter file."""
    warnings: tuple[str, ...]
    """One sentence for each setting that does nothing."""
    optimizer: str
    """The built optimizer and its arguments, as musubi-tuner writes them."""
    batches_per_epoch: int
    steps_per_epoch: int
    has_fp8_weights: bool
    memory: str
    """The estimate, in words."""
    folder: Path
    """Where the run saves."""
    mixes_prompts: bool
    """Whether a batch may hold prompts of different lengths."""

    @property
    def identity(self) -> Identity:
        """What a state must share with this run to be resumed by it."""
        return identity(self.job, self.optimizer, self.layers, self.mixes_prompts)

    def record(self) -> dict[str, Any]:
        """The configuration without paths of this machine; plain JSON, for files and logs."""
        job = self.job
        return {
            "plan": asdict(job.plan),
            "network": asdict(job.network),
            "timesteps": asdict(job.timesteps),
            "optimizer": self.optimizer,
            "lr_scheduler": job.optimizer.lr_scheduler,
            "lr_scheduler_args": dict(job.optimizer.lr_scheduler_args),
            "lr_warmup_steps": job.optimizer.warmup_steps(job.plan.steps),
            "architecture": self.architecture.title,
            "modules": len(self.layers),
            "parameters": self.parameters,
            "warnings": list(self.warnings),
            "items": job.data.items,
            "data": job.data.fingerprint,
            "memory": self.memory,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run hands to the graph."""

    resolved: Resolved
    lora: AdapterStateDict
    """A LORA_MODEL: tensors under ComfyUI's keys, with the file's metadata."""
    loss_map: Mapping[str, Any]
    checkpoints: Checkpoints
    file: Path | None
    """The finished adapter; None where nothing took it."""
    warnings: tuple[str, ...]
    """What went wrong on the way without ending the run."""
    steps_done: int
    seconds_per_step: float
    """NaN where no step was made."""
    first_step_seconds: float
    forward_calls_per_step: float
    """Calls of the network in a step of this session: more than batches where prompts of different
    lengths share one."""
    compiled: str

    @property
    def report(self) -> dict[str, Any]:
        """The resolved configuration and what came of it; plain JSON."""
        record = self.resolved.record()
        return {
            **record,
            "warnings": [*record["warnings"], *self.warnings],
            "folder": str(self.resolved.folder),
            **({"file": str(self.file)} if self.file else {}),
            "steps_done": self.steps_done,
            "seconds_per_step": _seconds(self.seconds_per_step),
            "first_step_seconds": _seconds(self.first_step_seconds),
            "forward_calls_per_step": round(self.forward_calls_per_step, 2),
            "compiled": self.compiled,
        }


def _seconds(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds, 4)


def musubi_fields(resolved: Resolved, started: datetime) -> dict[str, object]:
    """The `ss_` fields of a run under musubi-tuner's names, and those it forgets."""
    job = resolved.job
    plan, sampling, optimizer, base = job.plan, job.timesteps, job.optimizer, job.model.file
    return ({"sd_model_name": base} if base else {}) | {
        "session_id": int(started.timestamp() * 1e6) % 2**32,  # tells runs of one name apart
        "fp8_base": resolved.has_fp8_weights,
        "full_fp16": False,  # the adapter itself is always float32
        "full_bf16": False,
        "training_comment": None,
        "output_name": job.name,
        "learning_rate": plan.learning_rate,
        "num_train_items": job.data.items,
        "num_batches_per_epoch": resolved.batches_per_epoch,
        "num_epochs": -(-plan.steps // resolved.steps_per_epoch),
        "gradient_checkpointing": plan.gradient_checkpointing,
        "gradient_checkpointing_cpu_offload": False,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "max_train_steps": plan.steps,
        "lr_warmup_steps": optimizer.warmup_steps(plan.steps),
        "lr_scheduler": optimizer.lr_scheduler,
        "mixed_precision": plan.mixed_precision,
        "seed": plan.seed,
        "optimizer": resolved.optimizer,
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
