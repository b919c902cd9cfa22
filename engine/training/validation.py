"""Loss on held-out items: always the same noise at the same evenly spread noise levels."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..timesteps.sampling import TimestepSampling
from .dataset import TrainingItem
from .history import ValidationRecord
from .loop import TrainingRun, TrainingStep
from .objective import denoising_losses
from .options import Validation
from .seeds import torch_generator

BINS = 10


class Validator:
    """Measures one figure that can be compared across steps and across runs."""

    def __init__(self, items: Sequence[TrainingItem], validation: Validation) -> None:
        self.items = tuple(items)
        self._told = validation

    def is_due(self, run: TrainingRun) -> bool:
        return run.step % self._told.every_n_steps == 0 or run.step == run.plan.steps

    def measure(self, run: TrainingRun) -> ValidationRecord:
        """The mean unweighted loss over all items and noise levels, dropout off."""
        run.network.eval()
        try:
            with run.optimization.in_eval_mode(), torch.no_grad():
                pairs = [
                    pair for i, item in enumerate(self.items) for pair in self._losses(run, i, item)
                ]
        finally:
            run.network.train()
        return ValidationRecord(
            step=run.step,
            loss=sum(loss for _, loss in pairs) / len(pairs),
            bins=loss_per_bin(pairs),
        )

    def _losses(
        self, run: TrainingRun, index: int, item: TrainingItem
    ) -> Iterator[tuple[float, float]]:
        latents = item.latents[None].to(run.device, torch.float32)
        for n, level in enumerate(self._levels(run.timesteps.sampling, item)):
            generator = torch_generator(self._told.seed, "validation noise", index, n)
            noise = torch.randn(latents.shape, generator=generator).to(run.device)
            t = torch.tensor([level], dtype=torch.float32, device=run.device)
            loss = denoising_losses(
                run.denoiser, latents, noise, t, [item.conditioning], run.plan.loss_type
            )
            yield level, float(loss)

    def _levels(self, sampling: TimestepSampling, item: TrainingItem) -> list[float]:
        """Midpoints of equal shares of the run's own distribution of t."""
        count = self._told.timesteps_per_item
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        height, width = item.latents.shape[-2:]
        return sampling.distribution(height, width).from_uniform(u).tolist()


def loss_per_bin(pairs: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """Mean loss of (t, loss) pairs in equal bins of t; NaN in an empty bin."""
    sums, counts = [0.0] * BINS, [0] * BINS
    for t, loss in pairs:
        index = min(int(t * BINS), BINS - 1)
        sums[index] += loss
        counts[index] += 1
    return tuple(s / n if n else float("nan") for s, n in zip(sums, counts, strict=True))


def validated(
    steps: Iterable[TrainingStep], run: TrainingRun, validator: Validator
) -> Iterator[TrainingStep]:
    """Pass the steps through; every n steps, and after the last, measure.

    A run that was stopped before it could measure its last step does that first.
    """
    measured = [record.step for record in run.history.validations]
    if run.step and run.step not in measured and validator.is_due(run):
        run.history.validations.append(validator.measure(run))
    for step in steps:
        if validator.is_due(run):
            run.read_records()
            run.history.validations.append(validator.measure(run))
        yield step
