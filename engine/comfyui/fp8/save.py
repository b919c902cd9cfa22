"""A model with FP8 weights, written in ComfyUI's own format."""

import json
from pathlib import Path

import comfy.model_detection
import comfy.model_management
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...files import write_safetensors
from ...fp8.model_file import FP8, MARKER, QUANTIZATION_METADATA, marker_of


def save_fp8(patcher: ModelPatcher, path: Path) -> None:
    """Write the diffusion model of `patcher` to `path`; ValueError says why it cannot be.

    Scales per tensor load in any ComfyUI that knows `_quantization_metadata`. Finer scales name a
    format of ours, at which such a ComfyUI stops instead of reading them wrong.
    """
    if patcher.patches:
        raise ValueError(
            f"this model carries {len(patcher.patches)} patches (a LoRA), which would be rounded "
            "into FP8: save the model from before the LoRA, or merge the LoRA in the FP8 loader, "
            "where it is added before quantising"
        )
    comfy.model_management.load_models_gpu([patcher])  # takes another clone's patches off
    tensors = _state_dict(patcher)
    if not any(tensor.dtype in FP8 for tensor in tensors.values()):
        raise ValueError(
            "this model has no FP8 weights: load it with Load Diffusion Model (FP8 Scaled) first"
        )
    layers = {
        key.removesuffix(MARKER): marker_of(key, tensor)
        for key, tensor in tensors.items()
        if key.endswith(MARKER)
    }
    metadata = {
        "format": "pt",
        QUANTIZATION_METADATA: json.dumps({"format_version": "1.0", "layers": layers}),
    }
    write_safetensors(path, tensors, metadata)


def _state_dict(patcher: ModelPatcher) -> dict[str, Tensor]:
    """The diffusion model's tensors under the names of a diffusion model file."""
    with patcher.use_ejected():
        inside = patcher.model.diffusion_model.state_dict()
    saved = patcher.model.state_dict_for_saving(dict(inside))
    prefix = comfy.model_detection.unet_prefix_from_state_dict(saved)
    return {key.removeprefix(prefix): tensor for key, tensor in saved.items()}
