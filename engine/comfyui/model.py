"""From ComfyUI's MODEL to what the engine speaks of: the diffusion model and its architecture."""

import dataclasses
from pathlib import Path

import comfy.model_patcher
from torch import nn

from ..fp8.model_file import FP8
from ..network import architectures
from ..network.architectures import Architecture


def diffusion_model_of(patcher: comfy.model_patcher.ModelPatcher) -> nn.Module:
    """The denoising network itself; layer names are dotted from here."""
    return patcher.model.diffusion_model


def architecture_of(patcher: comfy.model_patcher.ModelPatcher) -> Architecture:
    """The row of the table that ComfyUI's detection fits; for none, the default under its name."""
    architecture = architectures.architecture_of(patcher.model.model_config.unet_config)
    if architecture is architectures.DEFAULT:
        return dataclasses.replace(architecture, title=type(patcher.model).__name__)
    return architecture


def file_name_of(patcher: comfy.model_patcher.ModelPatcher) -> str | None:
    """The file that the MODEL was loaded from, without its folder; None when the loader did not
    leave word of it."""
    if not patcher.cached_patcher_init:
        return None
    source = patcher.cached_patcher_init[1][0]  # a path, or what our FP8 loader was asked for
    path = getattr(source, "path", source)
    return Path(path).name if isinstance(path, str | Path) else None


def has_fp8_weights(patcher: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether any weight of the MODEL is stored in FP8, scaled or plain."""
    stored = (getattr(weight, "_qdata", weight) for weight in patcher.model.parameters())
    return any(weight.dtype in FP8 for weight in stored)
