"""The training loop: a generator of steps that writes no file, draws nothing and prints nothing."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..network.attach import Network, scale_weight_norms
from ..timesteps.stream import TimestepStream
from .dataset import Dataset
from .history import LossHistory, StepRecord
from .objective import Denoiser, sample_losses
from .optimizer import Optimization
from .plan import TrainingPlan
from .seeds import derived_seed, torch_generator

READ_EVERY_ON_DEVICE = 10
"""Steps between two reads of the losses from an accelerator; each read is a host sync."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number; the network still holds its last finite weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStep:
    """What the loop yields after each optimizer step."""

    step: int
    """Steps done, from 1."""
    records: tuple[StepRecord, ...]
    """Records that became readable; on an accelerator they arrive several at a time."""
    seconds: float
    """Wall time of this step."""


@dataclass(slots=True)
class _Pending:
    """The figures of a step that may still be on the device."""

    step: int
    loss: Tensor
    gradient_norm: Tensor
    learning_rates: tuple[float, ...]
    timesteps: list[float]
    sample_losses: list[Tensor]


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
        self.step = 0
        self.history = LossHistory()
        self._read_every = 1 if device.type == "cpu" else READ_EVERY_ON_DEVICE
        self._scaler = torch.amp.GradScaler(device.type, enabled=plan.mixed_precision == "fp16")
        self._pending: list[_Pending] = []
        self._timesteps_after_step = timesteps.state_dict()

    @property
    def batches_per_epoch(self) -> int:
        return self.dataset.batches_per_epoch(self.plan.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see about one epoch, at least 1."""
        return max(1, self.batches_per_epoch // self.plan.gradient_accumulation_steps)

    @property
    def epoch(self) -> int:
        """Whole passes over the data that are done."""
        return self.step * self.plan.gradient_accumulation_steps // self.batches_per_epoch

    def steps(self) -> Iterator[TrainingStep]:
        """Train until `plan.steps`; may be left and entered again at any step."""
        self.network.train()
        while self.step < self.plan.steps:
            started = time.perf_counter()
            self._pending.append(self._train_one_step())
            self.step += 1
            self._timesteps_after_step = self.timesteps.state_dict()
            due = self.step % self._read_every == 0 or self.step == self.plan.steps
            records = self.read_records() if due else ()
            yield TrainingStep(
                step=self.step, records=records, seconds=time.perf_counter() - started
            )

    def read_records(self) -> tuple[StepRecord, ...]:
        """Move pending figures into the history; TrainingDiverged when a loss is not finite."""
        records = tuple(_read(pending) for pending in self._pending)
        self._pending.clear()
        for record in records:
            if not math.isfinite(record.loss):
                raise TrainingDiverged(
                    f"the loss became {record.loss} at step {record.step}; the run stops with the "
                    "weights from before it: lower learning_rate, or train in bf16 instead of fp16"
                )
            self.history.records.append(record)
        return records

    def _train_one_step(self) -> _Pending:
        accumulation = self.plan.gradient_accumulation_steps
        losses, timesteps, per_sample = [], [], []
        for micro_step in range(self.step * accumulation, (self.step + 1) * accumulation):
            loss, t, samples = self._backward(micro_step)
            losses.append(loss)
            timesteps += t.tolist()
            per_sample.append(samples)
        norm = self._update()
        return _Pending(
            step=self.step + 1,
            loss=torch.stack(losses).mean(),
            gradient_norm=norm,
            learning_rates=self.optimization.last_learning_rates,
            timesteps=timesteps,
            sample_losses=per_sample,
        )

    def _backward(self, micro_step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Add one batch's gradients; returns its loss, its t and its samples' losses."""
        batch = self._batch(micro_step)
        items = [self.dataset.items[i] for i in batch]
        latents = torch.stack([item.latents for item in items]).to(self.device, torch.float32)
        t = self.timesteps.draw(batch, latents.shape[-2], latents.shape[-1])
        noise = torch.randn(
            latents.shape, generator=torch_generator(self.plan.seed, "noise", micro_step)
        ).to(self.device)
        at = t.to(self.device, torch.float32)
        with self._dropout_seeded(micro_step):
            prediction = self.denoiser.predict(
                self.denoiser.noised_input(latents, noise, at),
                at,
                [item.conditioning for item in items],
            )
            samples = sample_losses(
                prediction, self.denoiser.target(latents, noise, at), self.plan.loss_type
            )
            weight = self.timesteps.sampling.loss_weight(t).to(samples)
            loss = (weight * samples).mean()
            self._scaler.scale(loss / self.plan.gradient_accumulation_steps).backward()
        return loss.detach(), t, samples.detach()

    def _batch(self, micro_step: int) -> list[int]:
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        return self.dataset.batches(
            seed=self.plan.seed, epoch=epoch, batch_size=self.plan.batch_size
        )[index]

    @contextlib.contextmanager
    def _dropout_seeded(self, micro_step: int) -> Iterator[None]:
        """Dropout is a function of seed and position, and the host's random state is left alone."""
        with torch.random.fork_rng([self.device] if self.device.type != "cpu" else []):
            torch.manual_seed(derived_seed(self.plan.seed, "dropout", micro_step))
            yield

    def _update(self) -> Tensor:
        """Clip, step the optimizer, advance the schedule; returns the gradient norm."""
        optimizer = self.optimization.optimizer
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        self._scaler.unscale_(optimizer)
        limit = self.plan.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if not self._scaler.is_enabled():
            _drop_if_not_finite(parameters, norm)
        self._scaler.step(optimizer)
        self._scaler.update()
        self.optimization.advance()
        optimizer.zero_grad(set_to_none=True)
        if self.plan.scale_weight_norms:
            scale_weight_norms(self.network, self.plan.scale_weight_norms)
        return norm

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
        """Go on where `state` was taken."""
        self.network.load_state_dict(state["network"])
        self.optimization.load_state_dict(state["optimizer"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self.timesteps.load_state_dict(state["timesteps"])
        self._timesteps_after_step = self.timesteps.state_dict()
        self.history = LossHistory.from_state_dict(state["history"])
        self.step = int(state["step"])


def _read(pending: _Pending) -> StepRecord:
    return StepRecord(
        step=pending.step,
        loss=float(pending.loss),
        gradient_norm=float(pending.gradient_norm),
        learning_rates=pending.learning_rates,
        timesteps=tuple(pending.timesteps),
        sample_losses=tuple(torch.cat(pending.sample_losses).tolist()),
    )


def _drop_if_not_finite(parameters: list[nn.Parameter], norm: Tensor) -> None:
    """Without a host sync: gradients of a step whose norm is not finite become zero."""
    finite = torch.isfinite(norm)
    for parameter in parameters:
        parameter.grad.masked_fill_(~finite, 0.0)
