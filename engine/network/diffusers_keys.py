"""Adapter tensors under diffusers' names, in files that ComfyUI reads as well.

Alpha is folded into the matrices, √(alpha / rank) into each, because not every reader honours an
alpha key there; where our layer is several in diffusers its rows are split among them. The names
are the table's (`architectures`); models that no row detects keep ComfyUI's, some of which
diffusers converts. A test loads what is written here with diffusers itself.
"""

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from .architectures import Architecture
from .weights import AdapterWeights, row_blocks


def diffusers_state(
    weights: Mapping[str, AdapterWeights], architecture: Architecture
) -> dict[str, Tensor]:
    """Dotted layer name → weights, as the state dict of a file for diffusers.

    ValueError, before any tensor is made, when diffusers and ComfyUI do not both read such a file.
    """
    if architecture.diffusers_cannot:
        raise ValueError(
            f"key_format diffusers: {architecture.title}: {architecture.diffusers_cannot}; "
            "choose comfyui or kohya"
        )
    names = {name: _names_there(name, architecture) for name in weights}
    return {
        key: tensor
        for name, layer in weights.items()
        for key, tensor in _tensors(name, layer, names[name], architecture)
    }


def _names_there(name: str, architecture: Architecture) -> tuple[str, ...]:
    """The name, or names from the top of the rows, of our layer `name` in diffusers."""
    others = next((o for rename in architecture.diffusers if (o := rename.of(name))), ())
    if not others and re.fullmatch(architecture.diffusers_keeps, name):
        return (name,)
    if not others:
        raise ValueError(
            f"key_format diffusers: diffusers has no name for {name} of {architecture.title}; "
            "leave that layer out or choose comfyui"
        )
    return others


def _tensors(
    name: str, layer: AdapterWeights, others: tuple[str, ...], architecture: Architecture
) -> Iterable[tuple[str, Tensor]]:
    if layer.kind != "lora":
        raise ValueError(
            f"key_format diffusers: diffusers loads LoRA only, and {name} has a {layer.kind}; "
            "choose comfyui or kohya"
        )
    if layer.alpha < 0:
        raise ValueError(
            f"key_format diffusers: alpha is folded into both factors, and that of {name} is "
            f"{layer.alpha:g}; choose comfyui or kohya"
        )
    fold = math.sqrt(layer.alpha / layer.rank)
    down, up = layer.tensors["down"] * fold, layer.tensors["up"] * fold
    sizes = row_blocks(len(others), up.shape[0], down.shape[1])
    if min(sizes) < 0 or sum(sizes) != up.shape[0]:
        raise ValueError(
            f"key_format diffusers: the {up.shape[0]} rows of {name} are not those of its "
            f"{len(others)} parts there; choose comfyui or kohya"
        )
    for other, rows in zip(others, up.split(sizes), strict=True):
        for suffix, factor in zip(architecture.diffusers_suffixes, (down, rows), strict=True):
            # An attention layer of a U-Net by the name of its processor, to_q_lora
            joined = suffix.replace(".lora", "_lora", 1) if ".processor." in other else suffix
            # Copies: safetensors writes no two tensors that share memory.
            yield f"{architecture.diffusers_prefix}{other}{joined}", factor.clone()
