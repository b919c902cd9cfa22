"""Which layers are held in FP8, and how: formats, granularities and a preset per architecture."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..patterns import TimeLimit, UserPattern, check_patterns, compile_patterns
from ..refusals import refuse_other

FP8_DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
GRANULARITIES = ("tensor", "channel", "block")
SCALE_SEARCHES = ("amax", "mse")
SCALE_ROUNDINGS = ("exact", "musubi")
MODULATIONS = ("keep", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPatterns:
    """Regular expressions, searched in a layer's module name (`double_blocks.0.img_mod.lin`).

    LoRA Network's patterns must match the whole name, as musubi-tuner's; these name parts of it,
    as musubi's lists of FP8 keys do.
    """

    include: tuple[str, ...] = ()
    """A layer is quantised when one of these is found in its name …"""
    exclude: tuple[str, ...] = ()
    """… and none of these is."""


# musubi-tuner's choice of layers (its per-model FP8 target and exclude keys), carried to the module
# names of ComfyUI. Patterns of its lists that match no Linear in ComfyUI's models are left out.
PRESETS: dict[str, LayerPatterns] = {
    "wan2.1": LayerPatterns(include=(r"^(vace_)?blocks\.",)),
    "flux": LayerPatterns(
        include=(r"^(double|single)_blocks\.",), exclude=(r"_mod\.lin$", r"\.modulation\.lin$")
    ),
    "flux2": LayerPatterns(include=(r"^(double|single)_blocks\.",)),
    "chroma": LayerPatterns(include=(r"^(double|single)_blocks\.",)),
    "qwen_image": LayerPatterns(include=(r"^transformer_blocks\.",)),
    "lumina2": LayerPatterns(
        include=(r"^(layers|noise_refiner|context_refiner)\.",), exclude=(r"\.adaLN_modulation\.",)
    ),
    # musubi leaves HunyuanVideo unquantised; this is FLUX's choice for the same blocks
    "hunyuan_video": LayerPatterns(
        include=(r"^(double|single)_blocks\.",), exclude=(r"_mod\.lin$", r"\.modulation\.lin$")
    ),
    "hunyuan_video_1.5": LayerPatterns(include=(r"^double_blocks\.",)),
    "kandinsky5": LayerPatterns(
        include=(r"^(visual|text)_transformer_blocks\.", r"^(time_embeddings\.)?out_layer")
    ),
    "hidream_o1": LayerPatterns(
        include=(
            r"^language_model\.layers\.",
            r"^visual\.(blocks|merger|deepstack_merger_list)\.",
            r"^(t_embedder1|x_embedder|final_layer2)\.",
        )
    ),
    "krea2": LayerPatterns(include=(r"^blocks\.",)),
    "ideogram4": LayerPatterns(include=(r"^layers\.",), exclude=(r"\.adaln_modulation$",)),
}
GENERIC = LayerPatterns(
    include=(r"(^|\.)(\w*_)?(blocks?|layers)\.\d+\.",),
    exclude=(r"(^|[._])(mod|modulation|adaLN\w*|adaln\w*|norm\w*|emb\w*|time\w*)([._]|$)",),
)
"""For an architecture without a preset: Linears of repeated blocks, save modulations and such."""
MODULATION = r"(^|[._])(mod|modulation|adaLN\w*|adaln\w*)([._]|$)"
"""Layers that make shift, scale and gate of a block from one vector for each picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Whether one layer is quantised, and why."""

    quantize: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Policy:
    """How weights become FP8, and which."""

    fp8_format: str = "e4m3fn"
    """e4m3fn (3 mantissa bits, up to 448) or e5m2 (2 bits, up to 57344; twice the error)."""
    granularity: str = "block"
    """One scale per tensor, per output channel, or per block of inputs of a channel."""
    block_size: int = 64
    """Inputs that share a scale; a layer whose width is no multiple of it gets channel scales."""
    scale_search: str = "amax"
    """amax: the largest value becomes the largest code. mse: least squared error of 21 scales."""
    scale_rounding: str = "exact"
    """exact: float32 scales. musubi: computed, and so rounded, in the weight's own dtype."""
    modulation: str = "keep"
    """Of the blocks' modulation layers where the preset keeps them. keep: as they are. fp8: as the
    other layers of the blocks."""
    patterns: LayerPatterns = field(default_factory=LayerPatterns)
    """The user's own, on top of the preset: include admits more, exclude always wins."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("fp8_format", tuple(FP8_DTYPES)),
            ("granularity", GRANULARITIES),
            ("scale_search", SCALE_SEARCHES),
            ("scale_rounding", SCALE_ROUNDINGS),
            ("modulation", MODULATIONS),
        ):
            refuse_other(name, getattr(self, name), allowed)
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(f"block_size is {self.block_size}; give an even number, 2 or more")
        check_patterns("include_patterns", self.patterns.include)
        check_patterns("exclude_patterns", self.patterns.exclude)
        if self.scale_rounding == "musubi" and self.scale_search != "amax":
            raise ValueError("scale_rounding 'musubi' goes with scale_search 'amax' only")

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the codes."""
        return FP8_DTYPES[self.fp8_format]

    def group_size(self, in_features: int) -> int | None:
        """Inputs that share one scale of a row; None when the whole tensor shares one."""
        if self.granularity == "tensor":
            return None
        if self.granularity == "block" and in_features % self.block_size == 0:
            return self.block_size
        return in_features

    def decide(self, names: Sequence[str], architecture: str) -> dict[str, Decision]:
        """Whether each of these Linears of a model of `architecture` is quantised, and why.

        Raises ValueError when the user's patterns take too long.
        """
        limit = TimeLimit.start()
        exclude = compile_patterns("exclude_patterns", self.patterns.exclude, limit)
        include = compile_patterns("include_patterns", self.patterns.include, limit)
        decisions = {}
        for name in names:
            if pattern := _first_found(exclude, name, limit):
                decision = Decision(quantize=False, reason=f"your exclude pattern {pattern!r}")
            elif pattern := _first_found(include, name, limit):
                decision = Decision(quantize=True, reason=f"your include pattern {pattern!r}")
            else:
                decision = preset_decision(name, architecture, self.modulation)
            decisions[name] = decision
        return decisions


def preset_decision(name: str, architecture: str, modulation: str = "keep") -> Decision:
    """What the preset of an architecture, or the generic one, says of one Linear."""
    known = architecture in PRESETS
    preset, title = (PRESETS.get(architecture, GENERIC), architecture if known else "generic")
    excluding = next((p for p in preset.exclude if re.search(p, name)), None)
    included = any(re.search(pattern, name) for pattern in preset.include)
    if excluding and included and modulation == "fp8" and re.search(MODULATION, name):
        return Decision(quantize=True, reason="modulation in fp8")
    if excluding:
        return Decision(quantize=False, reason=f"{title} preset keeps {excluding!r}")
    if included:
        return Decision(quantize=True, reason=f"{title} preset")
    return Decision(quantize=False, reason=f"outside the layers of the {title} preset")


def _first_found(patterns: Iterable[UserPattern], name: str, limit: TimeLimit) -> str:
    """The first of these patterns that is found in the name, or ""."""
    return next((pattern.text for pattern in patterns if pattern.search(name, limit)), "")
