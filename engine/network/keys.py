"""The names of adapter tensors in files: three formats out, all of them and their dialects in.

    comfyui    diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight   + .alpha
    kohya      lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight         + .alpha
    diffusers  transformer.transformer_blocks.0.attn.to_q.lora_A.weight        alpha folded in

ComfyUI 0.33 loads the first two for every model it knows (`comfy/lora.py`). In the third, alpha is
folded into the matrices, √(alpha / rank) into each, because not every reader honours an alpha key
there; where our layer is several in diffusers its rows are split among them. Architectures without a
diffusers form of their own keep ComfyUI's dotted names there, which diffusers converts on loading.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .adapters import ADAPTERS
from .architectures import Architecture, Rename
from .layers import LayerShape
from .spec import Kind

KeyFormat = Literal["comfyui", "kohya", "diffusers"]
KEY_FORMATS: tuple[KeyFormat, ...] = get_args(KeyFormat)
COMFYUI_PREFIX, KOHYA_PREFIX = "diffusion_model.", "lora_unet_"
# What may stand before a layer's name; the longest are tried first.
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    COMFYUI_PREFIX,
    "lora_transformer_",
    "transformer.",
    "lycoris_",
    KOHYA_PREFIX,
    "unet.",
    "",
)
# Suffix → (kind, parameter). PEFT's A is down, its B is up.
_SUFFIXES: dict[str, tuple[Kind, str]] = {
    f".{suffix}": (kind, name)  # type: ignore[misc]
    for kind, adapter in ADAPTERS.items()
    for name, suffix in adapter.KEYS.items()
} | {
    ".lora_A.weight": ("lora", "down"),
    ".lora_B.weight": ("lora", "up"),
    ".lora_A.default.weight": ("lora", "down"),
    ".lora_B.default.weight": ("lora", "up"),
    ".lora.down.weight": ("lora", "down"),
    ".lora.up.weight": ("lora", "up"),
    ".lokr_w1_a": ("lokr", "w1_a"),
    ".lokr_w1_b": ("lokr", "w1_b"),
}
_ROW_FACTORS = {"lora": ("up",), "loha": ("w1_a", "w2_a")}
_COLUMN_FACTORS = {"lora": ("down",), "loha": ("w1_b", "w2_b")}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterWeights:
    """The tensors of one adapted layer, whatever file they came from or go to."""

    kind: Kind
    """lora, loha or lokr."""
    tensors: Mapping[str, Tensor]
    """Parameter name as in `adapters` → tensor."""
    alpha: float
    """Numerator of the scale alpha / rank."""

    @property
    def rank(self) -> int:
        """Inner width of the factors."""
        return rank_of(self.kind, self.tensors)


def rank_of(kind: Kind, tensors: Mapping[str, Tensor]) -> int:
    """Inner width of the factors of one adapter; 1 for a LoKr that is not low-rank at all."""
    inner = {"lora": "down", "loha": "w1_b", "lokr": "w2_b"}[kind]
    return tensors[inner].shape[0] if inner in tensors else 1


def encoded(
    weights: Mapping[str, AdapterWeights],
    key_format: KeyFormat,
    architecture: Architecture,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Dotted layer name → weights, as the state dict of a file; `dtype` None keeps each tensor's.

    Per layer in musubi's order: alpha, then the matrices. In kohya's format alpha has the dtype of the
    matrices, as musubi saves it; in ComfyUI's it stays exact (float32).
    """
    if key_format == "diffusers":
        return {
            key: tensor if dtype is None else tensor.to(dtype)
            for name, layer in weights.items()
            for key, tensor in _diffusers_tensors(name, layer, architecture)
        }
    state: dict[str, Tensor] = {}
    for name, layer in weights.items():
        stem = (
            KOHYA_PREFIX + name.replace(".", "_")
            if key_format == "kohya"
            else COMFYUI_PREFIX + name
        )
        tensors = {k: t if dtype is None else t.to(dtype) for k, t in layer.tensors.items()}
        alpha_dtype = next(iter(tensors.values())).dtype if key_format == "kohya" else torch.float32
        state[f"{stem}.alpha"] = torch.tensor(layer.alpha, dtype=alpha_dtype)
        for parameter, suffix in ADAPTERS[layer.kind].KEYS.items():
            if parameter in tensors:
                state[f"{stem}.{suffix}"] = tensors[parameter]
    return state


def decoded(
    state: Mapping[str, Tensor],
    layers: Mapping[str, LayerShape],
    architecture: Architecture,
) -> dict[str, AdapterWeights]:
    """Dotted layer name → weights of a state dict in any of the formats, in the model's order.

    `layers` (`layer_shapes` of the diffusion model) says what the names mean: names are compared with
    `.` and `_` alike, so that files whose names a converter garbled are read too. Layers that another
    program splits (to_q, to_k, to_v) are joined into ours. Alpha may be of any dtype; without one it is
    the rank. ValueError for keys that fit no layer of this model, or are of an unknown kind.
    """
    names = _Names(layers, architecture)
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        stem, parameter = _split(key)
        place = names.find(stem) if parameter else None
        if place is None:
            unknown.append(key)
        else:
            layer, part = place
            found.setdefault(layer, {}).setdefault(part, {})[parameter] = tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(state)} tensors are of no layer of this {architecture.title} model "
            f"or of a kind that Braid does not read, such as {unknown[0]!r}; connect the model that the "
            "file was trained on"
        )
    return {
        name: _joined(name, found[name], shape, names.parts[name])
        for name, shape in layers.items()
        if name in found
    }


def renamed(state: Mapping[str, Tensor], key_format: KeyFormat) -> dict[str, Tensor] | None:
    """A state dict in ComfyUI's format with the keys of `key_format`, whatever its tensors are.

    None when that takes knowledge of the model: diffusers' format, or keys in another one.
    """
    if key_format == format_of(state):
        return dict(state)
    if key_format != "kohya" or format_of(state) != "comfyui":
        return None
    return {
        KOHYA_PREFIX + stem[len(COMFYUI_PREFIX) :].replace(".", "_") + suffix: tensor
        for key, tensor in state.items()
        for stem, suffix in [_stem_and_suffix(key)]
    }


def format_of(keys: Iterable[str]) -> KeyFormat | None:
    """The format that all of the keys are in, None for a mixture or anything else."""
    keys = list(keys)
    if keys and all(key.startswith(KOHYA_PREFIX) for key in keys):
        return "kohya"
    if keys and all(key.startswith(COMFYUI_PREFIX) and ".lora_A." not in key for key in keys):
        return "comfyui"
    if keys and all(re.search(r"\.lora_[AB](\.default)?\.weight$", key) for key in keys):
        return "diffusers"
    return None


def _stem_and_suffix(key: str) -> tuple[str, str]:
    """Layer part of a key and the rest with its dot; the last component when it is not one of ours."""
    known = next((s for s in (*_SUFFIXES, ".alpha") if key.endswith(s)), None)
    suffix = known or "." + key.rpartition(".")[2]
    return key[: -len(suffix)], suffix


def _split(key: str) -> tuple[str, str]:
    """(layer part, parameter name) of a key; parameter "" when it is not of a kind we know."""
    stem, suffix = _stem_and_suffix(key)
    if suffix == ".alpha":
        return stem, "alpha"
    return stem, ":".join(_SUFFIXES[suffix]) if suffix in _SUFFIXES else ""


class _Names:
    """Every name that a layer of this model goes by in a file."""

    def __init__(self, layers: Mapping[str, LayerShape], architecture: Architecture) -> None:
        self.places: dict[str, tuple[str, int]] = {}
        """Name with underscores → (our dotted name, which of its row blocks; -1 = the whole)."""
        self.parts: dict[str, int] = {}
        """Our dotted name → number of row blocks that the architecture's other names divide it into."""
        for name in layers:
            self._add(name, name, -1)
            self.parts[name] = 1
            for rename in (*architecture.diffusers, *architecture.musubi):
                for part, other in enumerate(others := _other_names(rename, name)):
                    self._add(other, name, part if len(others) > 1 else -1)
                self.parts[name] = max(self.parts[name], len(others))

    def _add(self, other: str, name: str, part: int) -> None:
        self.places.setdefault(other.replace(".", "_"), (name, part))

    def find(self, stem: str) -> tuple[str, int] | None:
        for prefix in _PREFIXES:
            if stem.startswith(prefix):
                place = self.places.get(stem[len(prefix) :].replace(".", "_"))
                if place is not None:
                    return place
        return None


def _other_names(rename: Rename, name: str) -> tuple[str, ...]:
    """The names that `rename` gives to our layer `name`, () when it is not about it."""
    match = re.fullmatch(rename.layer, name)
    return tuple(match.expand(other) for other in rename.names) if match else ()


def _row_blocks(parts: int, rows: int, columns: int) -> tuple[int, ...]:
    """Rows of each part of a joint weight: q is square, k and v alike, the mlp has the rest."""
    if parts == 1:
        return (rows,)
    if parts == 3:
        return (columns, (rows - columns) // 2, (rows - columns) // 2)
    return (columns, columns, columns, rows - 3 * columns)


def _diffusers_tensors(
    name: str, layer: AdapterWeights, architecture: Architecture
) -> Iterable[tuple[str, Tensor]]:
    if layer.kind != "lora":
        raise ValueError(
            f"key_format diffusers: diffusers loads LoRA only, and {name} has a {layer.kind}; "
            "choose comfyui or kohya"
        )
    others = next((o for r in architecture.diffusers if (o := _other_names(r, name))), (name,))
    fold = math.sqrt(layer.alpha / layer.rank)
    down, up = layer.tensors["down"] * fold, layer.tensors["up"] * fold
    sizes = _row_blocks(len(others), up.shape[0], down.shape[1])
    for other, rows in zip(others, up.split(sizes), strict=True):
        yield f"{architecture.diffusers_prefix}{other}.lora_A.weight", down
        yield f"{architecture.diffusers_prefix}{other}.lora_B.weight", rows


def _joined(
    name: str, parts: Mapping[int, Mapping[str, Tensor]], shape: LayerShape, count: int
) -> AdapterWeights:
    """The weights of one layer from what a file holds of it: the whole, or row blocks of it."""
    if set(parts) == {-1}:
        return _weights(name, parts[-1])
    if -1 in parts:
        raise ValueError(f"the file adapts {name} twice: as a whole and in parts")
    blocks = {part: _weights(name, tensors) for part, tensors in parts.items()}
    kinds = {block.kind for block in blocks.values()}
    if len(kinds) > 1 or kinds == {"lokr"}:
        raise ValueError(f"the file holds parts of {name} as {', '.join(kinds)}, which do not join")
    return _stacked(blocks, _row_blocks(count, shape.out_features, shape.in_features))


def _weights(name: str, tensors: Mapping[str, Tensor]) -> AdapterWeights:
    """ "kind:parameter" → tensor, and "alpha", as AdapterWeights; checks that nothing is missing."""
    by_kind = {key.partition(":")[0] for key in tensors if key != "alpha"}
    if len(by_kind) != 1:
        raise ValueError(
            f"the file holds {', '.join(sorted(by_kind)) or 'only an alpha'} for {name}"
        )
    kind: Kind = by_kind.pop()  # type: ignore[assignment]
    own = {key.partition(":")[2]: tensor for key, tensor in tensors.items() if key != "alpha"}
    if "w1_a" in own and kind == "lokr":  # small enough to hold in full
        own["w1"] = own.pop("w1_a").float() @ own.pop("w1_b").float()
    complete = [set(ADAPTERS[kind].KEYS)]
    if kind == "lokr":
        complete = [{"w1", "w2"}, {"w1", "w2_a", "w2_b"}]
    if set(own) not in complete:
        raise ValueError(f"the file holds only {', '.join(sorted(own))} of the {kind} of {name}")
    rank = rank_of(kind, own)
    alpha = float(tensors["alpha"]) if "alpha" in tensors else float(rank)
    return AdapterWeights(kind=kind, tensors=own, alpha=alpha)


def _stacked(blocks: Mapping[int, AdapterWeights], sizes: tuple[int, ...]) -> AdapterWeights:
    """Row blocks of a weight, each with its own factors, as one pair of factors.

    Blocks that share their column factors (we write them so) keep their rank; others get a block
    diagonal of the sum of the ranks. Blocks that are absent stay zero.
    """
    first = next(iter(blocks.values()))
    rows, columns = _ROW_FACTORS[first.kind], _COLUMN_FACTORS[first.kind]
    scales = [block.alpha / block.rank for block in blocks.values()]
    alike = all(scale == scales[0] for scale in scales)
    shared = alike and all(
        torch.equal(block.tensors[c], first.tensors[c])
        for block in blocks.values()
        for c in columns
    )
    rank = first.rank if shared else sum(block.rank for block in blocks.values())
    tensors = {
        c: first.tensors[c] if shared else torch.cat([b.tensors[c] for b in blocks.values()])
        for c in columns
    }
    for factor in rows:
        tail = first.tensors[factor].shape[2:]
        joint = first.tensors[factor].new_zeros((sum(sizes), rank, *tail))
        start = 0
        for part, block in blocks.items():
            top = sum(sizes[:part])
            fold = 1.0 if alike or factor != rows[0] else block.alpha / block.rank
            at = slice(0, rank) if shared else slice(start, start + block.rank)
            joint[top : top + sizes[part], at] = block.tensors[factor] * fold
            start += block.rank
        tensors[factor] = joint
    alpha = rank * (scales[0] if alike else 1.0)
    return AdapterWeights(kind=first.kind, tensors=tensors, alpha=alpha)
