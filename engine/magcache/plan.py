"""What is known about a model's residuals over sigma: measured by a calibration, or published."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..disk.reading import MAX_JSON_BYTES, damage_named, open_regular, parse_json
from ..document import object_from
from ..texts import Text
from .curve import falls

FORMAT = "braid.magcache/1"
DEEPEST = 8
"""Brackets in each other in a calibration's file; there are four."""
LARGEST_SIGMA, LEAST_FALL = 1e6, 1e-9
"""Of a calibration's noise levels: beyond, the interpolation between them leaves the numbers."""
LARGEST_RATIO, LARGEST_PRODUCT = 1e6, 1e30
POSITIVE, NEGATIVE = "positive", "negative"
MOST_RATIOS = 10_000
"""Values of one list: a run of more steps has never been measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """Everything a calibration was measured under; None or empty where it is not known."""

    steps: int
    """Number of sampling steps."""
    sigmas: tuple[float, ...] = ()
    """The steps + 1 noise levels of the run, falling."""
    model: str = ""
    """Class name of the model."""
    architecture: str = ""
    """Hash of the names and shapes of its parameters."""
    patches: str = ""
    """Which LoRAs and other weight patches were on the model."""
    sampler: str = ""
    """Name of the sampler function."""
    shift: float | None = None
    """The model's timestep shift."""
    resolution: tuple[int, ...] = ()
    """Height and width of the latent."""
    frames: int | None = None
    """Frames of the latent; None for pictures."""
    cfg: float | None = None
    """Guidance scale of the run."""
    dtype: str = ""
    """Data type the model computed in."""
    measure: str = ""
    """`latent` (output of the whole model) or `blocks` (residual of the block stack)."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, a run has at least 1")
        if self.sigmas and len(self.sigmas) != self.steps + 1:
            raise ValueError(
                f"sigmas: {self.steps} steps have {self.steps + 1} noise levels, "
                f"got {len(self.sigmas)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """How the residual of one conditioning changes from step to step."""

    label: str
    """`positive`, `negative`, `conditioning 2` …"""
    ratios: tuple[float, ...]
    """Magnitude of each step's residual over the one before; the first is 1."""
    spread: tuple[float, ...] = ()
    """Standard deviation of that ratio over tokens; empty where not published."""
    cosine_distance: tuple[float, ...] = ()
    """Mean of 1 - cos between a step's residual and the one before; empty where not published."""

    def __post_init__(self) -> None:
        if not self.ratios:
            raise ValueError(f"ratios of {self.label}: the list is empty")
        for name in ("spread", "cosine_distance"):
            values = getattr(self, name)
            if values and len(values) != len(self.ratios):
                raise ValueError(
                    f"{name} of {self.label}: {len(self.ratios)} steps need as many values, "
                    f"got {len(values)}"
                )
        for index, ratio in enumerate(self.ratios):
            if not 1 / LARGEST_RATIO <= ratio <= LARGEST_RATIO:
                raise ValueError(
                    f"ratios of {self.label}: value {index} is {ratio}, allowed are numbers "
                    f"above 0, from {1 / LARGEST_RATIO:g} to {LARGEST_RATIO:g}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCachePlan:
    """Everything measured about a model's residuals, from which any run's skipping is decided."""

    name: str
    """What a person calls it: the preset's name, or the model it was calibrated on."""
    conditions: Conditions
    curves: tuple[Curve, ...]
    """One for each conditioning."""
    inner_products: tuple[tuple[float, ...], ...] = ()
    """Lower triangle of <r_i, r_j> / elements between the steps' cached quantities; the `planned`
    rule reads every prediction error from it. Empty for published lists."""
    source: str = ""
    """Where the numbers come from."""

    def __post_init__(self) -> None:
        if not self.curves:
            raise ValueError("curves: a plan needs at least one")
        steps = self.conditions.steps
        for curve in self.curves:
            if len(curve.ratios) != steps:
                raise ValueError(
                    f"ratios of {curve.label}: {steps} steps need {steps} values, "
                    f"got {len(curve.ratios)}"
                )
        sigmas = self.conditions.sigmas
        if not falls(sigmas) or not all(map(math.isfinite, sigmas)):
            raise ValueError("sigmas: the noise levels of a calibration must fall")
        least = min((a - b for a, b in zip(sigmas, sigmas[1:], strict=False)), default=1.0)
        if sigmas and (sigmas[0] > LARGEST_SIGMA or least < LEAST_FALL * sigmas[0]):
            raise ValueError(
                f"sigmas: the noise levels of a calibration fall from at most {LARGEST_SIGMA:g}, "
                f"each by a part of {LEAST_FALL:g} or more"
            )
        rows = [len(row) for row in self.inner_products]
        if rows and rows != list(range(1, steps + 1)):
            raise ValueError(f"inner_products: expected a lower triangle of {steps} rows")
        if not all(abs(x) <= LARGEST_PRODUCT for x in chain.from_iterable(self.inner_products)):
            raise ValueError(
                f"inner_products: a value is not a finite number below {LARGEST_PRODUCT:g}"
            )

    @property
    def calibrated(self) -> bool:
        """True when it was measured here, so that prediction errors are known."""
        return bool(self.inner_products) and bool(self.conditions.sigmas)

    def to_json(self) -> str:
        """The plan as a JSON document."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str | bytes) -> "MagCachePlan":
        """Read `to_json`'s text; ValueError in one sentence when it is something else."""
        try:
            raw = parse_json(text, DEEPEST)
        except ValueError as error:
            raise ValueError(f"not a MagCache calibration: {error}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(
                f"not a MagCache calibration: its format should be {FORMAT!r}; "
                "save one with MagCache Calibration"
            )
        try:
            return object_from(MagCachePlan, raw)
        except ValueError as error:
            raise ValueError(f"damaged MagCache calibration: {error}") from error


def calibrated_name(conditions: Conditions) -> Text:
    """What a plan is called that was measured in such a run."""
    return Text(
        "{model} calibrated at {steps} steps", model=conditions.model, steps=conditions.steps
    )


def read_plan(path: Path) -> MagCachePlan:
    """The calibration in a file; DamagedFileError when it holds something else."""
    with open_regular(path) as file, damage_named(path):
        return MagCachePlan.from_json(file.read(MAX_JSON_BYTES + 1))


def plan_from_ratios(text: str) -> MagCachePlan:
    """A plan from musubi's `--magcache_mag_ratios` text: comma-separated, one curve.

    Several lines are the sections of one video; they are averaged, as musubi's documentation
    advises. ValueError names the value that is not a number above 0, or the line of another length.
    """
    sections = [_parse_line(line) for line in text.splitlines() if line.strip(" ,\t")]
    if not sections:
        raise ValueError("mag_ratios is empty: give a comma-separated list, or choose a preset")
    lengths = {len(section) for section in sections}
    if len(lengths) > 1:
        raise ValueError(
            f"mag_ratios: sections must have the same number of values, got {sorted(lengths)}"
        )
    ratios = mean_row(sections)
    return MagCachePlan(
        name="mag_ratios",
        conditions=Conditions(steps=len(ratios)),
        curves=(Curve(label=POSITIVE, ratios=ratios),),
        source="typed by hand",
    )


def _parse_line(line: str) -> tuple[float, ...]:
    tokens = line.replace(" ", "").strip(",").split(",")
    if len(tokens) > MOST_RATIOS:
        raise ValueError(f"mag_ratios: {len(tokens)} values in one line; at most {MOST_RATIOS}")
    values = []
    for token in tokens:
        try:
            values.append(float(token))
        except ValueError:
            raise ValueError(
                f"mag_ratios: {token[:40]!r} is not a number; expected a list like 1.0,1.02,0.98"
            ) from None
    return tuple(values)


def mean_row(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Mean of equally long rows, value by value."""
    return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))


def ratios_text(plan: MagCachePlan) -> str:
    """The first curve as musubi prints it: 5 decimals, comma-separated, leading 1.00000."""
    return ",".join(f"{ratio:.5f}" for ratio in plan.curves[0].ratios)


CHECKED = {
    "model": "another model",
    "architecture": "a model of another size",
    "patches": "other LoRAs or weight patches",
    "sampler": "another sampler",
    "shift": "another timestep shift",
    "resolution": "another latent resolution",
    "frames": "another number of latent frames",
    "cfg": "another guidance scale",
    "dtype": "another data type",
    "measure": "another cached quantity",
}


def mismatches(measured: Conditions, running: Conditions) -> list[str]:
    """One sentence for each known field in which a run differs from its calibration."""
    found = []
    for field, meaning in CHECKED.items():
        was, now = _field(measured, field), _field(running, field)
        if was in ("", (), None) or now in ("", (), None) or _same(was, now):
            continue
        found.append(
            f"{field}: calibrated with {_show(was)}, running with {_show(now)} ({meaning})"
        )
    if measured.sigmas and running.sigmas:
        found += _outside(measured.sigmas, running.sigmas)
    return found


def _field(conditions: Conditions, name: str) -> Any:
    return asdict(conditions)[name]


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, float) and isinstance(now, float):
        return math.isclose(was, now, rel_tol=1e-3)
    return was == now


def _show(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _outside(measured: Sequence[float], running: Sequence[float]) -> list[str]:
    tolerance = 0.02 * measured[0]
    if running[0] > measured[0] + tolerance or running[-1] < measured[-1] - tolerance:
        return [
            f"sigmas: calibrated from {measured[0]:.4g} to {measured[-1]:.4g}, "
            f"running from {running[0]:.4g} to {running[-1]:.4g} (values outside are guessed)"
        ]
    return []
