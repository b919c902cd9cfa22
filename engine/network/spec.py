"""NetworkSpec: everything that shapes the trainable adapter, and its text form `network_args`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from ..arguments import (
    parse_arguments,
    parse_bool,
    parse_float,
    parse_int,
    refuse_unknown,
)
from ..patterns import check_patterns, parse_patterns
from ..refusals import shortened

Widget = TypeVar("Widget")
Parsed = TypeVar("Parsed")

Kind = Literal["lora", "loha", "lokr"]
TargetMode = Literal["musubi", "whitelist"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TARGET_MODES: tuple[TargetMode, ...] = get_args(TargetMode)
MAX_RANK = 4096
MAX_ALPHA = 1_000_000
MAX_LR_RATIO = 10_000
MAX_FACTOR = 1_000_000
"""Far beyond any use; float32 and the memory of the machine end somewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetPatterns:
    """Which layers are adapted: regular expressions that must match a whole dotted layer name."""

    exclude: tuple[str, ...] = ()
    """Layers left alone, besides those that the architecture excludes by default."""
    include: tuple[str, ...] = ()
    """"musubi": layers taken back in although excluded. "whitelist": the only layers taken."""
    mode: TargetMode = "musubi"

    def __post_init__(self) -> None:
        _refuse_other("target_mode", self.mode, TARGET_MODES)
        check_patterns("exclude_patterns", self.exclude)
        check_patterns("include_patterns", self.include)
        if self.mode == "whitelist" and not self.include:
            raise ValueError(
                "target_mode whitelist adapts only what include_patterns match, and none is given; "
                "write some, or choose target_mode musubi"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """The adapter of every adapted layer, and how its parameters are trained."""

    kind: Kind = "lora"
    rank: int = 16
    """Inner width of the two factors (musubi: network_dim)."""
    alpha: float = 0.0
    """The update is scaled by alpha / rank; 0 means alpha = rank (musubi: network_alpha)."""
    conv_rank: int | None = None
    """Rank for convolutions larger than 1 × 1; None leaves them alone (musubi: conv_dim)."""
    conv_alpha: float = 1.0
    """As alpha, for those convolutions; 0 means conv_rank."""
    neuron_dropout: float = 0.0
    """Chance in [0, 1) that one inner activation of a lora, or one input of a loha or lokr, is
    dropped (musubi: network_dropout)."""
    rank_dropout: float = 0.0
    """Chance in [0, 1) that one rank is dropped for one item of the batch; of loha and lokr, which
    have no common rank, that one output of the layer is dropped in one call."""
    module_dropout: float = 0.0
    """Chance in [0, 1] that a whole adapter is skipped in one call."""
    targets: TargetPatterns = field(default_factory=TargetPatterns)
    loraplus_lr_ratio: float | None = None
    """Learning rate of the up matrices over that of the others (LoRA+); None = equal."""
    lokr_factor: int = -1
    """LoKr: size of the small Kronecker factor; -1 = as square as possible (musubi: factor)."""
    verbose: bool = False
    """Log every layer, adapted or skipped, with the reason."""
    split_qkv: bool = False
    """A layer that holds q, k and v in one weight gets an adapter for each of them (sd-scripts)."""

    def __post_init__(self) -> None:
        _refuse_other("network_type", self.kind, KINDS)
        for name, rank in (("network_dim", self.rank), ("conv_dim", self.conv_rank)):
            if rank is not None:
                _check(name, rank, 1 <= rank <= MAX_RANK, f"1 or more, up to {MAX_RANK}")
        for name, alpha, default in (
            ("network_alpha", self.alpha, "network_dim"),
            ("conv_alpha", self.conv_alpha, "conv_dim"),
        ):
            allowed = f"0 (= {default}) or more, up to {MAX_ALPHA}"
            _check(name, alpha, 0 <= alpha <= MAX_ALPHA, allowed)
        for name, p in (
            ("network_dropout", self.neuron_dropout),
            ("rank_dropout", self.rank_dropout),
        ):
            _check(name, p, 0 <= p < 1, "from 0 to below 1")
        _check("module_dropout", self.module_dropout, 0 <= self.module_dropout <= 1, "from 0 to 1")
        if self.split_qkv and self.kind != "lora":
            raise ValueError(
                f"split_qkv=True: works on lora only, not on {self.kind}; switch split_qkv off or "
                "choose network_type lora"
            )
        ratio, factor = self.loraplus_lr_ratio, self.lokr_factor
        if ratio is not None:
            allowed = f"above 0 and up to {MAX_LR_RATIO} (4 to start with, 16 in the LoRA+ paper)"
            _check("loraplus_lr_ratio", ratio, 0 < ratio <= MAX_LR_RATIO, allowed)
        in_range = factor == -1 or 1 <= factor <= MAX_FACTOR
        _check("factor", factor, in_range, f"-1 (automatic) or 1 and more, up to {MAX_FACTOR}")

    @property
    def without_effect(self) -> tuple[str, ...]:
        """One sentence for each setting that these settings make no use of."""
        idle = (
            (
                self.loraplus_lr_ratio is not None and self.kind != "lora",
                f"loraplus_lr_ratio={self.loraplus_lr_ratio} has no effect on a {self.kind}: "
                "it has no up matrix",
            ),
            (
                self.lokr_factor != -1 and self.kind != "lokr",
                f"factor={self.lokr_factor} has no effect on a {self.kind}: it is of lokr",
            ),
            (
                self.conv_alpha != 1.0 and self.conv_rank is None,
                f"conv_alpha={self.conv_alpha} has no effect without conv_dim",
            ),
        )
        return tuple(sentence for is_idle, sentence in idle if is_idle)

    def rank_and_alpha(self, *, large_kernel: bool) -> tuple[int, float]:
        """Rank and alpha of one layer; `large_kernel`: a convolution larger than 1 × 1."""
        rank, alpha = self.rank, self.alpha
        if large_kernel and self.conv_rank is not None:
            rank, alpha = self.conv_rank, self.conv_alpha
        return rank, alpha or float(rank)


_WIDGETS = {
    "network_type": "kind",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "network_dropout": "neuron_dropout",
    "rank_dropout": "rank_dropout",
    "module_dropout": "module_dropout",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
}
KNOWN_ARGS = (
    *_WIDGETS,
    "conv_dim",
    "conv_alpha",
    "exclude_patterns",
    "include_patterns",
    "target_mode",
    "factor",
    "verbose",
    "split_qkv",
)


def parse_network_args(
    text: str,
    *,
    network_type: str = "lora",
    network_dim: int = 16,
    network_alpha: float = 16.0,
    loraplus_lr_ratio: float = 0.0,
    exclude_patterns: str = "",
    include_patterns: str = "",
    target_mode: str = "musubi",
    network_dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    split_qkv: bool = False,
) -> NetworkSpec:
    """The spec that widget values (musubi's names) and `network_args` text ask for; the text wins.

    `loraplus_lr_ratio` 0 on the widget means off; a ratio of 0 or less in the text is refused.
    """
    given = parse_arguments(text, "network_args")
    refuse_unknown("network_args", given, KNOWN_ARGS)
    return NetworkSpec(
        kind=given.get("network_type", network_type),  # type: ignore[arg-type]  # checked by the spec
        rank=_parsed(given, "network_dim", network_dim, parse_int),
        alpha=_parsed(given, "network_alpha", network_alpha, parse_float),
        conv_rank=_parsed(given, "conv_dim", None, parse_int),
        conv_alpha=_parsed(given, "conv_alpha", 1.0, parse_float),
        neuron_dropout=_parsed(given, "network_dropout", network_dropout, parse_float),
        rank_dropout=_parsed(given, "rank_dropout", rank_dropout, parse_float),
        module_dropout=_parsed(given, "module_dropout", module_dropout, parse_float),
        targets=TargetPatterns(
            exclude=parse_patterns(
                "exclude_patterns", given.get("exclude_patterns", exclude_patterns)
            ),
            include=parse_patterns(
                "include_patterns", given.get("include_patterns", include_patterns)
            ),
            mode=given.get("target_mode", target_mode),  # type: ignore[arg-type]  # likewise
        ),
        loraplus_lr_ratio=_parsed(
            given, "loraplus_lr_ratio", loraplus_lr_ratio or None, parse_float
        ),
        lokr_factor=_parsed(given, "factor", -1, parse_int),
        verbose=_parsed(given, "verbose", False, parse_bool),
        split_qkv=_parsed(given, "split_qkv", split_qkv, parse_bool),
    )


def network_args_of(spec: NetworkSpec) -> dict[str, str]:
    """The `network_args` that say what differs from a plain LoRA, as musubi stores them.

    `parse_network_args` of these tokens, with network_type, _dim, _alpha and _dropout of the spec
    as widgets, gives the same spec.
    """
    arguments: dict[str, object] = {}
    if spec.conv_rank is not None:
        arguments |= {"conv_dim": spec.conv_rank, "conv_alpha": spec.conv_alpha}
    if spec.rank_dropout:
        arguments["rank_dropout"] = spec.rank_dropout
    if spec.module_dropout:
        arguments["module_dropout"] = spec.module_dropout
    if spec.targets.exclude:
        arguments["exclude_patterns"] = list(spec.targets.exclude)
    if spec.targets.include:
        arguments["include_patterns"] = list(spec.targets.include)
    if spec.targets.mode != "musubi":
        arguments["target_mode"] = spec.targets.mode
    if spec.loraplus_lr_ratio is not None:
        arguments["loraplus_lr_ratio"] = spec.loraplus_lr_ratio
    if spec.kind == "lokr":
        arguments["factor"] = spec.lokr_factor
    if spec.verbose:
        arguments["verbose"] = True
    if spec.split_qkv:
        arguments["split_qkv"] = True
    return {key: str(value) for key, value in arguments.items()}


def _parsed(
    given: Mapping[str, str], key: str, widget: Widget, parse: Callable[[str, str], Parsed]
) -> Widget | Parsed:
    return parse(key, given[key]) if key in given else widget


def _check(name: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:  # nor does any comparison with NaN
        shown = value if abs(value) < 1e15 else f"{value:g}"
        raise ValueError(f"{name}={shown}: must be {allowed}")


def _refuse_other(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={shortened(value)}: must be one of {', '.join(allowed)}")
