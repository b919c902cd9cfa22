"""The names of adapter tensors in files: three formats out, all of them and their dialects in.

    comfyui    diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight   + .alpha
    kohya      lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight         + .alpha
    diffusers  transformer.transformer_blocks.0.attn.to_q.lora_A.weight        alpha folded in

ComfyUI 0.33 loads the first two for every model it knows (`comfy/lora.py`); `weights` writes the
third.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from .adapters import ADAPTERS, Adapter
from .architectures import Architecture
from .layers import LayerShape
from .spec import Kind
from .weights import (
    AdapterWeights,
    checked_weights,
    delta_shape,
    diffusers_state,
    row_blocks,
    stacked,
)

KeyFormat = Literal["comfyui", "kohya", "diffusers"]
ALPHA = ".alpha"
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
    f".{suffix}": (kind, name)
    for kind, adapter in ADAPTERS.items()
    for name, suffix in adapter.KEYS.items()
} | {
    ".lora_A.weight": ("lora", "down"),
    ".lora_B.weight": ("lora", "up"),
    ".lora_A.default.weight": ("lora", "down"),
    ".lora_B.default.weight": ("lora", "up"),
    ".lora.down.weight": ("lora", "down"),
    ".lora.up.weight": ("lora", "up"),
    "_lora.down.weight": ("lora", "down"),
    "_lora.up.weight": ("lora", "up"),
    ".lokr_w1_a": ("lokr", "w1_a"),
    ".lokr_w1_b": ("lokr", "w1_b"),
}
_KNOWN_SUFFIXES = (*_SUFFIXES, ALPHA)
_OF_DIFFUSERS = r"(\.lora_[AB](\.default)?|^unet\..*[._]lora\.(down|up))\.weight$"


def kohya_name(layer_name: str) -> str:
    """A layer in kohya's and musubi's files: the prefix, and the dotted name with underscores."""
    return KOHYA_PREFIX + layer_name.replace(".", "_")


def comfyui_key(layer_name: str, adapter: Adapter, parameter: str) -> str:
    """The key of one parameter in ComfyUI's format."""
    return f"{COMFYUI_PREFIX}{layer_name}.{adapter.KEYS[parameter]}"


def encoded(
    weights: Mapping[str, AdapterWeights],
    key_format: KeyFormat,
    architecture: Architecture,
) -> dict[str, Tensor]:
    """Dotted layer name → weights, as the state dict of a file.

    Per layer in musubi's order: alpha, then the matrices. In kohya's format alpha has the dtype of
    the matrices, as musubi saves it; in ComfyUI's it stays exact (float32).
    """
    if key_format == "diffusers":
        return diffusers_state(weights, architecture)
    state: dict[str, Tensor] = {}
    for name, layer in weights.items():
        tensors = layer.tensors
        if key_format == "kohya":
            stem, alpha_dtype = kohya_name(name), next(iter(tensors.values())).dtype
        else:
            stem, alpha_dtype = COMFYUI_PREFIX + name, torch.float32
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

    `layers` (`layer_shapes` of the diffusion model) says what the names mean; `.` and `_` count as
    the same, so that files whose names a converter garbled are read too. Layers that another tool
    splits (to_q, to_k, to_v) are joined into ours. Alpha may be of any dtype; without one it is the
    rank. ValueError for keys that fit no layer of this model, or are of an unknown kind.
    """
    names = _Names(layers, architecture)
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        stem, suffix = _stem_and_suffix(key)
        place = names.find(stem)
        if place is None or suffix not in _KNOWN_SUFFIXES:
            unknown.append(key)
        else:
            layer, part = place
            found.setdefault(layer, {}).setdefault(part, {})[suffix] = tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(state)} tensors belong to no layer of this model "
            f"({architecture.title}) or are of a kind that Braid does not read, such as "
            f"{unknown[0]!r}; use the model that they were trained on"
        )
    return {
        name: _joined(name, found[name], shape, names.parts[name])
        for name, shape in layers.items()
        if name in found
    }


def converted(
    state: Mapping[str, Tensor],
    key_format: KeyFormat,
    architecture: Architecture | None = None,
    layers: Mapping[str, LayerShape] | None = None,
) -> dict[str, Tensor]:
    """A state dict in any format, in `key_format`.

    From ComfyUI's format to kohya's only the keys change, whatever the tensors are; diffusers'
    takes the architecture. Keys that do not spell ComfyUI's dotted names take the `layers` of the
    model as well. ValueError when what it takes is None.
    """
    given = format_of(state)
    if given == key_format:
        return dict(state)
    if given == "comfyui" and key_format == "kohya":
        return {
            kohya_name(stem[len(COMFYUI_PREFIX) :]) + suffix: tensor
            for key, tensor in state.items()
            for stem, suffix in [_stem_and_suffix(key)]
        }
    if architecture is not None and layers is not None:
        return encoded(decoded(state, layers, architecture), key_format, architecture)
    if architecture is not None and given == "comfyui":
        return encoded(_spelled(state), key_format, architecture)
    raise ValueError(
        f"key_format {key_format}: this takes the names of the model's layers; connect the model "
        "that the LoRA was trained on"
    )


def _spelled(state: Mapping[str, Tensor]) -> dict[str, AdapterWeights]:
    """Dotted layer name → weights of a state dict in ComfyUI's format, which spells the names."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        stem, suffix = _stem_and_suffix(key)
        if suffix not in _KNOWN_SUFFIXES:
            raise ValueError(f"{key}: not a LoRA, which is all that this key_format holds")
        found.setdefault(stem[len(COMFYUI_PREFIX) :], {})[suffix] = tensor
    return {name: _weights(name, tensors) for name, tensors in found.items()}


def format_of(keys: Iterable[str]) -> KeyFormat | None:
    """The format that all of the keys are in, None for a mixture or anything else."""
    keys = list(keys)
    if keys and all(key.startswith(KOHYA_PREFIX) for key in keys):
        return "kohya"
    if keys and all(key.startswith(COMFYUI_PREFIX) and ".lora_A." not in key for key in keys):
        return "comfyui"
    if keys and all(re.search(_OF_DIFFUSERS, key) for key in keys):
        return "diffusers"
    return None


def _stem_and_suffix(key: str) -> tuple[str, str]:
    """Layer part of a key, and the rest with its dot (the last component when it is unknown)."""
    known = next((s for s in _KNOWN_SUFFIXES if key.endswith(s)), None)
    suffix = known or "." + key.rpartition(".")[2]
    return key[: -len(suffix)], suffix


class _Names:
    """Every name that a layer of this model goes by in a file."""

    def __init__(self, layers: Mapping[str, LayerShape], architecture: Architecture) -> None:
        self.places: dict[str, tuple[str, int]] = {}
        """Name with underscores → (our dotted name, which of its row blocks; -1 = the whole)."""
        self.parts: dict[str, int] = {}
        """Our dotted name → number of row blocks that other names divide it into."""
        for name in layers:
            self._add(name, name, -1)
            self.parts[name] = 1
            for rename in (*architecture.diffusers, *architecture.musubi):
                for part, other in enumerate(others := rename.of(name)):
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
    sizes = row_blocks(count, shape.out_features, shape.in_features)
    for part, block in blocks.items():
        if block.rows != sizes[part]:
            raise ValueError(
                f"part {part + 1} of {name} has {block.rows} rows in the file and {sizes[part]} in "
                "the model; use the model that it was trained on"
            )
        if delta_shape(block.kind, block.tensors)[1] != shape.fan_in:
            raise ValueError(f"part {part + 1} of {name} does not fit {shape} of the model")
    tails = {(key, t.shape[2:]) for block in blocks.values() for key, t in block.tensors.items()}
    if len(tails) > len({key for key, _ in tails}):
        raise ValueError(f"the file holds parts of {name} of different shapes, which do not join")
    return stacked(blocks, sizes)


def _weights(name: str, tensors: Mapping[str, Tensor]) -> AdapterWeights:
    """AdapterWeights of suffix → tensor; nothing may be missing."""
    own = {_SUFFIXES[suffix]: tensor for suffix, tensor in tensors.items() if suffix != ALPHA}
    kinds = {kind for kind, _ in own}
    if len(kinds) != 1:
        raise ValueError(f"the file holds {', '.join(sorted(kinds)) or 'only an alpha'} for {name}")
    (kind,) = kinds
    parameters = {parameter: tensor for (_, parameter), tensor in own.items()}
    return checked_weights(name, kind, parameters, tensors.get(ALPHA))
