"""The training loop: a generator of steps that writes no file, draws nothing and prints nothing."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..network.attach import Network, check_weight_norms, scale_weight_norms
from ..timesteps.stream import TimestepStream
from .dataset import Dataset
from .history import LossHistory, StepRecord
from .objective import Denoiser, denoising_losses
from .optimizers.optimizer import Optimization
from .plan import TrainingPlan
from .seeds import derived_seed, torch_generator
from .states.form import check_like, count_of, misfits_refused, part_of

READ_EVERY_ON_DEVICE = 10
"""Steps between two reads of the losses from an accelerator; each read is a host sync."""
SPEED_WINDOW = 50
"""Steps over which the speed is averaged."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number; the network still holds finite weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStep:
    """What the loop yields after each optimizer step."""

    step: int
    """Steps done, from 1."""
    seconds: float
    """Wall time of this step."""


@dataclass(slots=True)
class _Pending:
    """The figures of a step that may still be on the device."""

    step: int
    learning_rates: tuple[float, ...]
    timesteps: list[float]
    figures: Tensor
    """Loss, gradient norm, the loss of each sample, then the weight norms if they are limited."""


class TrainingRun:
    """One run: its plan, data, model and everything that changes while it trains."""

    def __init__(
        self,
        *,
        plan: TrainingPlan,
        dataset: Dataset,
        denoiser: Denoiser,
        network: Network,
        timesteps: TimestepStream,
        optimization: Optimization,
        device: torch.device,
    ) -> None:
        self.plan = plan
        self.dataset = dataset
        self.denoiser = denoiser
        self.network = network
        self.timesteps = timesteps
        self.optimization = optimization
        self.device = device
        if plan.scale_weight_norms:
            check_weight_norms(network, plan.scale_weight_norms)
        self.step = 0
        self.history = LossHistory()
        self._read_every = 1 if device.type == "cpu" else READ_EVERY_ON_DEVICE
        self._scaler = torch.amp.GradScaler(device.type, enabled=plan.mixed_precision == "fp16")
        self._pending: list[_Pending] = []
        self._timesteps_after_step = timesteps.state_dict()
        self._epoch_batches: tuple[int, list[list[int]]] = (-1, [])
        self._durations: deque[float] = deque(maxlen=SPEED_WINDOW)
        self._shapes_met: set[torch.Size] = set()
        self._warming_up = False
        self.first_step_seconds = math.nan
        """Of this session; compiling and warming up happen in it."""
        self.resumed_from = ""
        """The state file that the next step goes on from."""

    @property
    def batches_per_epoch(self) -> int:
        return self.dataset.batches_per_epoch(self.plan.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every item has been seen, as musubi-tuner counts them."""
        return -(-self.batches_per_epoch // self.plan.gradient_accumulation_steps)

    @property
    def epoch(self) -> int:
        """Whole passes over the data that are done."""
        return self.epoch_after(self.step)

    def epoch_after(self, step: int) -> int:
        """Whole passes over the data that are done after `step` steps."""
        return step * self.plan.gradient_accumulation_steps // self.batches_per_epoch

    @property
    def seconds_per_step(self) -> float:
        """Mean of this session's last steps, without those that met a shape for the first time."""
        if not self._durations:
            return self.first_step_seconds
        return sum(self._durations) / len(self._durations)

    def steps(self) -> Iterator[TrainingStep]:
        """Train until `plan.steps`; may be left and entered again, after an error in a step too."""
        self.network.train()
        self.timesteps.load_state_dict(self._timesteps_after_step)
        self.optimization.optimizer.zero_grad(set_to_none=True)
        while self.step < self.plan.steps:
            started, self._warming_up = time.perf_counter(), False
            self._pending.append(self._train_one_step())
            self.step += 1
            self._timesteps_after_step = self.timesteps.state_dict()
            if self.step % self._read_every == 0 or self.step == self.plan.steps:
                self.read_records()
            seconds = self._timed(time.perf_counter() - started)
            yield TrainingStep(step=self.step, seconds=seconds)

    def read_records(self) -> None:
        """Move pending figures into the history; TrainingDiverged when a loss is not finite."""
        records = _read(self._pending)
        self._pending.clear()
        self.history.records += records
        for record in records:
            _refuse_if_diverged(record.loss, record.step)

    def _timed(self, seconds: float) -> float:
        if math.isnan(self.first_step_seconds):
            self.first_step_seconds = seconds
        if not self._warming_up:
            self._durations.append(seconds)
        return seconds

    def _train_one_step(self) -> _Pending:
        accumulation = self.plan.gradient_accumulation_steps
        losses, timesteps, per_sample = [], [], []
        for micro_step in range(self.step * accumulation, (self.step + 1) * accumulation):
            loss, t, samples = self._backward(micro_step)
            losses.append(loss)
            timesteps += t.tolist()
            per_sample.append(samples)
        loss = torch.stack(losses).mean()
        if self._read_every == 1:  # reading costs nothing here, so the bad step is never made
            _refuse_if_diverged(float(loss), self.step + 1)
        norm, weight_norms = self._update()
        return _Pending(
            step=self.step + 1,
            learning_rates=self.optimization.last_learning_rates,
            timesteps=timesteps,
            figures=torch.cat([torch.stack([loss, norm]), *per_sample, *weight_norms]),
        )

    def _backward(self, micro_step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Add one batch's gradients; returns its loss, its t and its samples' losses."""
        batch = self._batch(micro_step)
        items = [self.dataset.items[i] for i in batch]
        latents = torch.stack([item.latents for item in items]).to(self.device, torch.float32)
        self._warming_up |= latents.shape not in self._shapes_met
        self._shapes_met.add(latents.shape)
        t = self.timesteps.draw(batch, latents.shape[-2], latents.shape[-1])
        noise = torch.randn(
            latents.shape, generator=torch_generator(self.plan.seed, "noise", micro_step)
        ).to(self.device)
        at = t.to(self.device, torch.float32)
        with self._dropout_seeded(micro_step):
            conditioning = [item.conditioning for item in items]
            samples = denoising_losses(
                self.denoiser, latents, noise, at, conditioning, self.plan.loss_type
            )
            weight = self.timesteps.sampling.loss_weight(t).to(samples)
            loss = (weight * samples).mean()
            self._scaler.scale(loss / self.plan.gradient_accumulation_steps).backward()
        return loss.detach(), t, samples.detach()

    def _batch(self, micro_step: int) -> list[int]:
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        if self._epoch_batches[0] != epoch:
            batches = self.dataset.batches(
                seed=self.plan.seed, epoch=epoch, batch_size=self.plan.batch_size
            )
            self._epoch_batches = (epoch, batches)
        return self._epoch_batches[1][index]

    @contextlib.contextmanager
    def _dropout_seeded(self, micro_step: int) -> Iterator[None]:
        """Dropout is a function of seed and position, and the host's random state is left alone."""
        with torch.random.fork_rng([self.device] if self.device.type != "cpu" else []):
            torch.manual_seed(derived_seed(self.plan.seed, "dropout", micro_step))
            yield

    def _update(self) -> tuple[Tensor, list[Tensor]]:
        """Clip, step the optimizer, advance the schedule, limit the weights.

        Returns the gradient norm and, where weights are limited, one tensor of their three figures.
        """
        optimizer = self.optimization.optimizer
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        self._scaler.unscale_(optimizer)
        limit = self.plan.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if not self._scaler.is_enabled():
            _drop_if_not_finite(parameters, norm)
        with misfits_refused(self.resumed_from):  # only this step knows what it needs of a state
            self._scaler.step(optimizer)
        self.resumed_from = ""
        self._scaler.update()
        self.optimization.advance()
        optimizer.zero_grad(set_to_none=True)
        if not self.plan.scale_weight_norms:
            return norm, []
        limited = scale_weight_norms(self.network, self.plan.scale_weight_norms)
        figures = [limited.scaled.float(), limited.norms.mean(), limited.norms.max()]
        return norm, [torch.stack(figures)]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the plan and the data; nested dicts of JSON and tensors.

        Taken during a step, it is the state after the last whole step.
        """
        self.read_records()
        return {
            "step": self.step,
            "network": {k: v.detach().clone() for k, v in self.network.state_dict().items()},
            "optimizer": self.optimization.state_dict(),
            "scaler": self._scaler.state_dict(),
            "timesteps": self._timesteps_after_step,
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; ValueError names the part that is not of such a run."""
        step, weights = count_of(state, "step"), part_of(state, "network")
        check_like(self.network.state_dict(), weights, "network")
        history = LossHistory.from_state_dict(part_of(state, "history"))
        self.timesteps.load_state_dict(part_of(state, "timesteps"))
        self.optimization.load_state_dict(part_of(state, "optimizer"))
        self.network.load_state_dict(weights)
        if self._scaler.is_enabled():
            check_like(self._scaler.state_dict(), part_of(state, "scaler"), "scaler")
            self._scaler.load_state_dict(state["scaler"])
        self._timesteps_after_step = self.timesteps.state_dict()
        self.history, self.step = history, step


def _read(pending: list[_Pending]) -> list[StepRecord]:
    """Records of all pending steps, in one transfer."""
    if not pending:
        return []
    figures = torch.cat([step.figures for step in pending]).cpu()
    records = []
    for step, mine in zip(pending, figures.split([len(p.figures) for p in pending]), strict=True):
        loss, norm, *rest = mine.tolist()
        samples = len(step.timesteps)
        records.append(
            StepRecord(
                step=step.step,
                loss=loss,
                gradient_norm=norm,
                learning_rates=step.learning_rates,
                timesteps=tuple(step.timesteps),
                sample_losses=tuple(rest[:samples]),
                weight_norms=tuple(rest[samples:]),
            )
        )
    return records


def _refuse_if_diverged(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingDiverged(
            f"the loss became {loss} at step {step}; the run stops with its last finite weights: "
            "lower learning_rate, or train in bf16 instead of fp16"
        )


def _drop_if_not_finite(parameters: list[nn.Parameter], norm: Tensor) -> None:
    """Without a host sync: gradients of a step whose norm is not finite become zero."""
    finite = torch.isfinite(norm)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(~finite, 0.0)
