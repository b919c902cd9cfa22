"""Which layers are adapted, and why each of the others is not.

musubi's rule, on names dotted from the root of the diffusion model, a pattern having to match the
*whole* name: a layer of the blocks is skipped when an exclude matches it and no include does.
Mode "whitelist" is what many expect include to mean: only what an include matches (and no exclude
of the user's), anywhere in the model, whatever the architecture's defaults.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..patterns import TimeLimit, UserPattern, compile_patterns
from .adapters import ADAPTERS, LoKr, SplitLoRA
from .architectures import Architecture
from .layers import LayerShape, layers_of
from .spec import NetworkSpec, TargetMode, TargetPatterns
from .weights import parts_of

logger = logging.getLogger("comfyui_braid.network")
DEFAULT_EXCLUDE, EXCLUDE, INCLUDE = "default exclude", "exclude_patterns", "include_patterns"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One Linear or convolution of the model."""

    name: str
    """Dotted from the root of the diffusion model."""
    module: nn.Module
    """The layer itself."""
    shape: LayerShape
    """Its features and kernel."""
    selected: bool
    """Whether it is adapted."""
    reason: str
    """Why it is adapted or skipped."""
    rows: tuple[int, ...] = ()
    """Outputs of each part that gets an adapter of its own, from the top; () = one for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PatternCount:
    """How many layers one pattern matches."""

    pattern: str
    """The regular expression."""
    origin: str
    """`default exclude`, `exclude_patterns` or `include_patterns`."""
    matches: int
    """Layers whose whole name it matches, among those it is asked about."""
    near: int
    """Layers in whose name it occurs, what `.*pattern.*` would match; counted when none matches."""

    @property
    def advice(self) -> str:
        """What to do when nothing matches."""
        if self.near:
            wider = f".*{self.pattern}.*"
            return f"a pattern must match the whole name: '{wider}' would match {self.near}"
        return "no layer name contains it"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetReport:
    """The outcome of `select_targets`."""

    architecture: Architecture
    """The table row that gave the defaults."""
    spec: NetworkSpec
    """What was asked for."""
    candidates: tuple[Candidate, ...]
    """Every Linear and convolution, in the model's order."""
    patterns: tuple[PatternCount, ...]
    """Every pattern in use."""

    @property
    def selected(self) -> tuple[Candidate, ...]:
        """The layers that are adapted, in the model's order."""
        return tuple(candidate for candidate in self.candidates if candidate.selected)

    @property
    def parameters(self) -> int:
        """Trainable numbers in total."""
        return sum(parameter_count(c.shape, self.spec, c.rows) for c in self.selected)

    @property
    def filed_parameters(self) -> int:
        """Numbers of an adapter file: more where the up matrices of q, k and v are one, with zeros
        beside them."""
        return sum(parameter_count(c.shape, self.spec) * max(len(c.rows), 1) for c in self.selected)

    @property
    def _unsplit(self) -> tuple[str, ...]:
        if not self.spec.split_qkv or any(candidate.rows for candidate in self.selected):
            return ()
        return (
            "split_qkv has no effect: no adapted layer of this model, taken for "
            f"{self.architecture.title}, holds q, k and v in one weight",
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each setting, and each pattern of the user's, that does nothing."""
        return (
            self.spec.without_effect
            + self._unsplit
            + tuple(
                f"{count.origin}: '{count.pattern}' matches no layer; {count.advice}"
                for count in self.patterns
                if not count.matches and count.origin != DEFAULT_EXCLUDE
            )
        )


def select_targets(model: nn.Module, spec: NetworkSpec, architecture: Architecture) -> TargetReport:
    """Decide for every Linear and convolution of `model`, the diffusion model itself.

    Raises ValueError when nothing is selected, with the patterns that came near, and when the
    patterns take too long.
    """
    layers = tuple(layers_of(model))
    outside = {name: _outside(name, shape, spec, architecture) for name, _, shape in layers}
    asked = [name for name, reason in outside.items() if not reason]
    matches = _matches(asked, spec.targets, architecture)
    decided = {name: _decide(name, matches, spec.targets.mode) for name in asked}
    candidates = tuple(
        Candidate(
            name=name,
            module=module,
            shape=shape,
            selected=selected,
            reason=reason,
            rows=parts_of(name, shape, architecture) if spec.split_qkv else (),
        )
        for name, module, shape in layers
        for selected, reason in [decided.get(name, (False, outside[name]))]
    )
    report = TargetReport(
        architecture=architecture,
        spec=spec,
        candidates=candidates,
        patterns=tuple(match.count for match in matches),
    )
    if spec.verbose:
        for candidate in candidates:
            verb = "adapted" if candidate.selected else "skipped"
            logger.info("%s %s: %s", verb, candidate.name, candidate.reason)
    if not report.selected:
        raise ValueError(_nothing_selected(report, asked))
    return report


def parameter_shapes(
    shape: LayerShape, spec: NetworkSpec, rows: tuple[int, ...] = ()
) -> dict[str, tuple[int, ...]]:
    """Name → size of the parameters that the adapter of one layer holds; `rows` as in Candidate."""
    rank, _ = spec.rank_and_alpha(large_kernel=shape.has_large_kernel)
    if rows:
        return SplitLoRA.parameter_shapes(shape, rank, len(rows))
    if spec.kind == "lokr":
        return LoKr.parameter_shapes(shape, rank, spec.lokr_factor)
    return ADAPTERS[spec.kind].parameter_shapes(shape, rank)


def parameter_count(shape: LayerShape, spec: NetworkSpec, rows: tuple[int, ...] = ()) -> int:
    """Trainable numbers that the adapter of one layer holds."""
    return sum(math.prod(size) for size in parameter_shapes(shape, spec, rows).values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matches:
    """What one pattern matches of the layers that it is asked about."""

    count: PatternCount
    names: frozenset[str]
    """The layers whose whole name it matches."""


def _matches(
    names: Sequence[str], targets: TargetPatterns, architecture: Architecture
) -> tuple[_Matches, ...]:
    """Every pattern in use on `names`, in the order in which they are asked."""
    defaults = () if targets.mode == "whitelist" else architecture.exclude
    origins = ((DEFAULT_EXCLUDE, defaults), (EXCLUDE, targets.exclude), (INCLUDE, targets.include))
    limit = TimeLimit.start()
    return tuple(
        _match(pattern, names, limit)
        for origin, patterns in origins
        for pattern in compile_patterns(origin, patterns, limit)
    )


def _match(pattern: UserPattern, names: Sequence[str], limit: TimeLimit) -> _Matches:
    matching = frozenset(name for name in names if pattern.fullmatch(name, limit))
    near = 0 if matching else sum(pattern.search(name, limit) for name in names)
    count = PatternCount(
        pattern=pattern.text, origin=pattern.option, matches=len(matching), near=near
    )
    return _Matches(count=count, names=matching)


def _decide(name: str, matches: Sequence[_Matches], mode: TargetMode) -> tuple[bool, str]:
    """(adapted, why) for a layer that may be adapted."""
    excluded = _first(name, matches, (DEFAULT_EXCLUDE, EXCLUDE))
    included = _first(name, matches, (INCLUDE,))
    if mode == "whitelist":
        if not included:
            return False, "no include_patterns match"
        return (False, excluded) if excluded else (True, included)
    if excluded and included:
        return True, f"{included} takes it back from {excluded}"
    return (False, excluded) if excluded else (True, "in the blocks")


def _first(name: str, matches: Sequence[_Matches], origins: tuple[str, ...]) -> str:
    """Origin and pattern of the first one of these origins that matches, or ""."""
    for match in matches:
        if match.count.origin in origins and name in match.names:
            return f"{match.count.origin} '{match.count.pattern}'"
    return ""


def _outside(name: str, shape: LayerShape, spec: NetworkSpec, architecture: Architecture) -> str:
    """Why a layer is not adapted whatever the patterns, or ""."""
    whitelist = spec.targets.mode == "whitelist"
    if not whitelist and not re.fullmatch(architecture.layers, name):
        return "outside the blocks"
    return _unfit(shape, spec)


def _unfit(shape: LayerShape, spec: NetworkSpec) -> str:
    """Why a layer cannot be adapted, or ""."""
    if shape.groups != 1:
        return f"convolution in {shape.groups} groups"
    if shape.padding_mode != "zeros":
        return f"convolution with {shape.padding_mode} padding"
    if shape.has_large_kernel and spec.conv_rank is None:
        return "convolution larger than 1 × 1; set conv_dim to adapt it"
    return ""


def _nothing_selected(report: TargetReport, asked: list[str]) -> str:
    if not asked:
        return (
            f"no layer to adapt: this model, taken for {report.architecture.title}, has no Linear "
            f"named like '{report.architecture.layers}'; set target_mode whitelist and name the "
            "layers in include_patterns"
        )
    near = [f"{c.origin} '{c.pattern}': {c.advice}" for c in report.patterns if not c.matches]
    hint = "; ".join(near) or "the excludes match all of them; add include_patterns"
    return (
        f"no layer to adapt: the patterns leave none of {len(asked)} layers such as {asked[0]!r}; "
        + hint
    )
