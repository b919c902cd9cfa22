"""From ComfyUI's MODEL to what the engine speaks of: the diffusion model and its architecture."""

import dataclasses

import comfy.model_patcher
from torch import nn

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
