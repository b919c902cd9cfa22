"""What must be the same for a resumed run to be the same run."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ...network.layers import LayerShape
from ...network.spec import NetworkSpec
from ...timesteps.sampling import TimestepSampling
from ..job import TrainingJob
from ..plan import TrainingPlan

VERSION = 2
"""1 was the text of whole settings, written by Braid 0.1.0."""
OF_THE_PLAN = (
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
BATCHES, ALIKE, MIXED = "batches", "of prompts of one length", "of prompts of any length"
Layers = Sequence[tuple[str, LayerShape]]
"""(name, shape) of every adapted layer, in the model's order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """The figures that a state carries, and those of this run that they are compared with."""

    named: Mapping[str, Any]
    """Plain JSON, every setting under its name."""
    as_0_1_0: Mapping[str, Any] = field(default_factory=dict)
    """The same as that version wrote it."""

    def difference(self, saved: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """(name, saved, ours) of the first figure in which a state differs; None for none.

        A setting that is newer than the state was at its default in the run that saved it.
        """
        ours, theirs, defaults = self.named, _flat(saved), _flat(_defaults())
        if "version" not in saved and self.as_0_1_0:
            ours, theirs = self.as_0_1_0, dict(saved)
        for name, value in _flat(ours).items():
            expected = theirs.get(name, defaults.get(name))
            if name != "version" and (isinstance(expected, Tensor) or expected != value):
                return name, expected, value
        return None


def identity(
    job: TrainingJob, optimizer: str, layers: Layers, mixes_prompts: bool = False
) -> Identity:
    """Of the run that `job` describes; `optimizer` is the built optimizer's own description.

    mixes_prompts: whether prompts of different lengths share batches. Until that was so they were
    batched apart, in another order.
    """
    same = _in_every_version(job, optimizer) | {BATCHES: MIXED if mixes_prompts else ALIKE}
    named = same | {
        "version": VERSION,
        "network": asdict(job.network),
        "timesteps": asdict(job.timesteps),
        "lr_scheduler_args": dict(job.optimizer.lr_scheduler_args),
        "adapted layers": _summary([(name, asdict(shape)) for name, shape in layers]),
    }
    as_0_1_0 = same | {
        "network": _text_0_1_0(job.network),
        "timesteps": _text_0_1_0(job.timesteps),
        "lr_scheduler_args": repr(dict(job.optimizer.lr_scheduler_args)),
        "adapted layers": _summary([(name, _text_0_1_0(shape)) for name, shape in layers]),
    }
    return Identity(named=named, as_0_1_0=as_0_1_0)


def _in_every_version(job: TrainingJob, optimizer: str) -> dict[str, Any]:
    return {
        "architecture": job.model.architecture,
        "data": job.data.fingerprint,
        "optimizer": optimizer,
        "lr_scheduler": job.optimizer.lr_scheduler,
        "lr_warmup_steps": job.optimizer.lr_warmup_steps,
        "ema_shadows": job.checkpointing.ema_shadows,
        **{name: getattr(job.plan, name) for name in OF_THE_PLAN},
    }


def _defaults() -> dict[str, Any]:
    plan = TrainingPlan(steps=1)
    return {
        BATCHES: ALIKE,
        "network": asdict(NetworkSpec()),
        "timesteps": asdict(TimestepSampling()),
        **{name: getattr(plan, name) for name in OF_THE_PLAN},
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots: network.rank."""

    def visit() -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping) and value:
                yield from _flat(value, f"{prefix}{name}.").items()
            else:
                yield f"{prefix}{name}", value

    return dict(visit())


# --- what Braid 0.1.0 wrote: the text of whole settings, under the fields they had then ----------

FIELDS_0_1_0 = {
    "NetworkSpec": (
        *("kind", "rank", "alpha", "conv_rank", "conv_alpha", "neuron_dropout", "rank_dropout"),
        *("module_dropout", "targets", "loraplus_lr_ratio", "lokr_factor", "verbose"),
    ),
    "TargetPatterns": ("exclude", "include", "mode"),
    "TimestepSampling": (
        *("mode", "weighting_scheme", "discrete_flow_shift", "sigmoid_scale", "logit_mean"),
        *("logit_std", "mode_scale", "mid_ratio", "logsnr_ratio", "logsnr2_ratio"),
        *("min_timestep", "max_timestep", "preserve_distribution_shape", "num_timestep_buckets"),
    ),
    "LayerShape": (
        *("in_features", "out_features", "kernel", "stride", "padding", "dilation"),
        *("padding_mode", "groups"),
    ),
}


def _text_0_1_0(value: Any) -> str:
    """`value` as 0.1.0 wrote it; with a field that is newer and in use, no text of that version."""
    kind = type(value).__name__
    if kind not in FIELDS_0_1_0:
        return repr(value)
    known = FIELDS_0_1_0[kind]
    newer = [f.name for f in fields(value) if f.name not in known]
    in_use = [name for name in newer if getattr(value, name)]
    named = (f"{name}={_text_0_1_0(getattr(value, name))}" for name in (*known, *in_use))
    return f"{kind}({', '.join(named)})"


def _summary(layers: Sequence[Any]) -> str:
    return f"{len(layers)} ({fingerprint(layers)})"


def fingerprint(value: Any) -> str:
    """A short SHA-256 of nested lists and dicts of tensors, numbers and text."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(repr((tuple(value.shape), value.dtype)).encode())
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy())
    elif isinstance(value, Mapping):
        _feed(digest, sorted((str(key), part) for key, part in value.items()))
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _feed(digest, part)
    elif value is None or isinstance(value, (bool, int, float, str)):
        digest.update(repr(value).encode())
    else:  # an object of the host, whose contents are its own affair
        digest.update(type(value).__name__.encode())
