"""From the residuals of a full run to a plan: ratio, spread, cosine distance, inner products."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .clock import StepClock
from .plan import POSITIVE, Conditions, Curve, MagCachePlan, calibrated_name, mean_row
from .residuals import ConditioningNames

GUIDED = "guided prediction"
"""What a guider makes of a step's conditionings; recorded beside them."""
SKETCH_ELEMENTS = 1 << 18
"""Elements of the fixed random sample that inner products are taken on; 0.2 % relative error."""


def consecutive_change(previous: Tensor, current: Tensor, channel_dim: int) -> Tensor:
    """(3,) ratio, spread and cosine distance of `current` over `previous`, token by token.

    norm_ratio = mean(|cur| / |prev|), norm_std its unbiased standard deviation, cos_dis =
    mean(1 - cos), with norms over `channel_dim` (musubi-tuner and the authors; behaviour 8.4).
    Tokens whose previous residual is zero say nothing about a ratio and are left out.
    """
    previous, current = previous.float(), current.float()
    before = torch.linalg.vector_norm(previous, dim=channel_dim)
    after = torch.linalg.vector_norm(current, dim=channel_dim)
    known = before > 0
    count = known.sum().clamp(min=1)
    ratio = torch.where(known, after / torch.where(known, before, 1.0), 0.0)
    mean = torch.where(known.any(), ratio.sum() / count, 1.0)
    variance = torch.where(known, (ratio - mean) ** 2, 0.0).sum() / (count - 1).clamp(min=1)
    cosine = torch.nn.functional.cosine_similarity(current, previous, dim=channel_dim, eps=1e-8)
    return torch.stack((mean, variance.sqrt(), (1.0 - cosine).mean()))


def sketch_index(elements: int) -> Tensor | None:
    """Positions of the sampled elements, the same for every step; None takes all of them."""
    if elements <= SKETCH_ELEMENTS:
        return None
    generator = torch.Generator().manual_seed(elements)
    return torch.randint(elements, (SKETCH_ELEMENTS,), generator=generator)


class ResidualRecorder:
    """Collects one conditioning's residuals step by step; keeps the last, and small samples."""

    def __init__(self, label: str, channel_dim: int) -> None:
        self.label = label
        self.channel_dim = channel_dim
        self._previous: Tensor | None = None
        self._changes: list[Tensor] = []
        self._samples: list[Tensor] = []
        self._index: Tensor | None = None

    def add(self, residual: Tensor) -> None:
        """The residual of the next step, (B, C, ...) or (B, L, D) with `channel_dim` as told."""
        if self._previous is not None and self._previous.shape == residual.shape:
            self._changes.append(consecutive_change(self._previous, residual, self.channel_dim))
        if not self._samples:
            index = sketch_index(residual.numel())
            self._index = index if index is None else index.to(residual.device)
        flat = residual.detach().reshape(-1)
        self._samples.append((flat if self._index is None else flat[self._index]).float().cpu())
        self._previous = residual.detach().clone()

    @property
    def steps(self) -> int:
        """Residuals taken so far."""
        return len(self._samples)

    def curve(self) -> Curve:
        """The curve of the steps taken, rounded to 5 decimals as musubi does."""
        changes = [change.tolist() for change in self._changes]
        ratios, spread, cosine = zip((1.0, 0.0, 0.0), *changes, strict=True)
        return Curve(
            label=self.label,
            ratios=tuple(max(round(ratio, 5), 1e-5) for ratio in ratios),
            spread=tuple(round(value, 5) for value in spread),
            cosine_distance=tuple(round(max(value, 0.0), 7) for value in cosine),
        )

    def inner_products(self) -> tuple[tuple[float, ...], ...]:
        """Lower triangle of <r_i, r_j> / elements, in double precision."""
        samples = torch.stack(self._samples).double()
        products = (samples @ samples.T / samples.shape[1]).tolist()
        return tuple(tuple(row[: index + 1]) for index, row in enumerate(products))


def calibrated_plan(
    name: str,
    conditions: Conditions,
    recorders: Sequence[ResidualRecorder],
    cached: Sequence[ResidualRecorder],
    source: str,
) -> MagCachePlan:
    """The plan of one full run.

    `recorders`: one per conditioning, for the ratios. `cached`: whose inner products the planned
    rule reads; for a cached velocity that is the guided prediction alone, because the line
    through two predictions is linear and so commutes with guidance.
    """
    triangles = [recorder.inner_products() for recorder in cached]
    return MagCachePlan(
        name=name,
        conditions=conditions,
        curves=tuple(recorder.curve() for recorder in recorders),
        inner_products=tuple(mean_row(rows) for rows in zip(*triangles, strict=True)),
        source=source,
    )


class Measurement:
    """One run while it is being measured."""

    def __init__(self, conditions: Conditions, clock: StepClock) -> None:
        self.clock = clock
        self.active = False
        """True in the first call at a step's own noise level, which alone is measured."""
        self.names = ConditioningNames()
        self._conditions = conditions
        self._last = -1
        self._recorders: dict[str, ResidualRecorder] = {}

    def tick(self, timestep: Tensor) -> None:
        """A new call of the guider begins."""
        self.clock.tick(timestep)
        at = self.clock
        self.active = at.on_schedule and at.step > self._last and at.sigma > 0
        self._last = at.step if self.active else self._last

    def add(self, label: str, residual: Tensor, channel_dim: int) -> None:
        """Record the residual of `label` at this step."""
        if label not in self._recorders:
            self._recorders[label] = ResidualRecorder(label, channel_dim)
        self._recorders[label].add(residual)

    def plan(self) -> MagCachePlan:
        """The finished plan; ValueError when not every step could be measured."""
        conditions = self._conditions
        steps = conditions.steps
        whole = {label: r for label, r in self._recorders.items() if r.steps == steps}
        guided = whole.pop(GUIDED, None)
        if guided is None or not whole:
            raise ValueError(
                f"MagCache calibration: {conditions.sampler} did not call the model at all of "
                f"its {steps} noise levels; calibrate with euler, and use the plan with any sampler"
            )
        recorders = sorted(whole.values(), key=lambda r: not r.label.startswith(POSITIVE))
        return calibrated_plan(
            name=calibrated_name(conditions),
            conditions=conditions,
            recorders=recorders,
            cached=recorders if conditions.measure == "blocks" else [guided],
            source="measured by MagCache Calibrate",
        )


def average_of_alike(plans: Sequence[MagCachePlan]) -> MagCachePlan:
    """The mean of those of `plans` that were measured as the last one was."""
    last = plans[-1]
    alike = [plan for plan in plans if _measured_alike(plan, last)]
    if len(alike) == 1:
        return last
    return MagCachePlan(
        name=last.name,
        conditions=last.conditions,
        curves=tuple(
            _average_curve(curves) for curves in zip(*(p.curves for p in alike), strict=True)
        ),
        inner_products=tuple(
            mean_row(rows) for rows in zip(*(p.inner_products for p in alike), strict=True)
        ),
        source=f"{last.source}, mean of {len(alike)} runs",
    )


def _measured_alike(one: MagCachePlan, other: MagCachePlan) -> bool:
    labels = [[curve.label for curve in plan.curves] for plan in (one, other)]
    return one.conditions == other.conditions and labels[0] == labels[1]


def _average_curve(curves: Sequence[Curve]) -> Curve:
    return Curve(
        label=curves[0].label,
        ratios=mean_row([curve.ratios for curve in curves]),
        spread=mean_row([curve.spread for curve in curves]),
        cosine_distance=mean_row([curve.cosine_distance for curve in curves]),
    )
