"""Which layers are held in FP8, and how: formats, granularities and a preset per architecture."""

import re
from dataclasses import dataclass, field

import torch

FP8_DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
GRANULARITIES = ("tensor", "channel", "block")
SCALE_SEARCHES = ("amax", "mse")
SCALE_ROUNDINGS = ("exact", "musubi")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPatterns:
    """Regular expressions, searched in a layer's module name (`double_blocks.0.img_mod.lin`)."""

    include: tuple[str, ...] = ()
    """A layer is quantised when one of these is found in its name …"""
    exclude: tuple[str, ...] = ()
    """… and none of these is."""

    def __post_init__(self) -> None:
        for kind in ("include", "exclude"):
            for pattern in getattr(self, kind):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"{kind} pattern {pattern!r} is not a regular expression: {error}"
                    ) from error


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
    patterns: LayerPatterns = field(default_factory=LayerPatterns)
    """The user's own, on top of the preset: include admits more, exclude always wins."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("fp8_format", tuple(FP8_DTYPES)),
            ("granularity", GRANULARITIES),
            ("scale_search", SCALE_SEARCHES),
            ("scale_rounding", SCALE_ROUNDINGS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(f"block_size is {self.block_size}; give an even number, 2 or more")
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

    def decide(self, name: str, architecture: str) -> Decision:
        """Whether the Linear called `name` in a model of `architecture` is quantised, and why."""
        if pattern := _first_match(self.patterns.exclude, name):
            return Decision(quantize=False, reason=f"your exclude pattern {pattern!r}")
        if pattern := _first_match(self.patterns.include, name):
            return Decision(quantize=True, reason=f"your include pattern {pattern!r}")
        known = architecture in PRESETS
        preset, title = (PRESETS.get(architecture, GENERIC), architecture if known else "generic")
        if pattern := _first_match(preset.exclude, name):
            return Decision(quantize=False, reason=f"{title} preset keeps {pattern!r}")
        if pattern := _first_match(preset.include, name):
            return Decision(quantize=True, reason=f"{title} preset")
        return Decision(quantize=False, reason=f"outside the layers of the {title} preset")


def _first_match(patterns: tuple[str, ...], name: str) -> str | None:
    return next((pattern for pattern in patterns if re.search(pattern, name)), None)
