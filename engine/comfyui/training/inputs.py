"""The live values of the host that a training job refers to, and the job that refers to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comfy.model_patcher import ModelPatcher

from ...network.spec import NetworkSpec
from ...timesteps.sampling import TimestepSampling
from ...training.job import DataReference, ModelReference, TrainingJob
from ...training.optimizers.optimizer import OptimizerSpec
from ...training.options import Checkpointing, TrainingOptions
from ...training.plan import TrainingPlan
from ...training.states.identity import fingerprint
from ..model import architecture_of, file_name_of
from .items import Pair, pair_items
from .preview import PreviewSampling


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingInputs:
    """What a run works on, as the host gives it."""

    patcher: ModelPatcher
    pairs: Sequence[Pair]
    """The training items."""
    held_out: Sequence[Pair] = ()
    """The items of `validation`."""
    preview_sampling: PreviewSampling | None = None
    loras: Path
    """The folder under which the run's own folder is made."""
    spare_folders: Sequence[Path] = ()
    """Where a LoRA goes that finds no room there, in order of preference."""

    @property
    def largest_latents(self) -> tuple[int, ...]:
        """(C, [T], H, W) of the largest item."""
        largest = max((samples for samples, _ in self.pairs), key=lambda samples: samples.numel())
        return tuple(largest.shape[1:])


def held_out_pairs(options: TrainingOptions) -> list[Pair]:
    """The items of Validation Loss; none without that option."""
    held_out = options.held_out
    return pair_items(held_out.latents, held_out.conditioning) if held_out else []


def build_job(
    inputs: TrainingInputs,
    plan: TrainingPlan,
    network: NetworkSpec,
    timesteps: TimestepSampling | None = None,
    optimizer: OptimizerSpec | None = None,
    options: TrainingOptions | None = None,
) -> TrainingJob:
    """What a run on `inputs` is told; what is None has its default."""
    chosen = options or TrainingOptions()
    return TrainingJob(
        plan=plan,
        network=network,
        timesteps=timesteps or TimestepSampling(),
        optimizer=optimizer or OptimizerSpec(),
        model=ModelReference(
            file=file_name_of(inputs.patcher),
            architecture=architecture_of(inputs.patcher).title,
        ),
        data=_reference(inputs.pairs),
        held_out=_reference(inputs.held_out) if inputs.held_out else None,
        checkpointing=chosen.checkpointing or Checkpointing(),
        log=chosen.log,
        compilation=chosen.compilation,
        preview=chosen.preview,
        validation=chosen.validation,
    )


def _reference(pairs: Sequence[Pair]) -> DataReference:
    return DataReference(items=len(pairs), fingerprint=fingerprint(pairs))
