"""The model of a file without its weights, and what the policy decides of each layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import comfy.lora
import comfy.lora_convert
import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.supported_models_base import BASE
from torch import Tensor

from ...fp8.policy import Decision, Fp8Policy
from ...network.layers import is_linear


@dataclass(frozen=True, kw_only=True, slots=True)
class Skeleton:
    """The model of a state dict, without weights."""

    config: BASE
    model: BaseModel
    """On the meta device."""
    module_keys: dict[str, str]
    """Key in the file -> key in `model.diffusion_model`; what ComfyUI rewrites is absent."""

    @property
    def module_names(self) -> dict[str, str]:
        """Name of a layer in the file -> its name in `model.diffusion_model`."""
        return {
            raw.removesuffix(".weight"): key.removesuffix(".weight")
            for raw, key in self.module_keys.items()
            if raw.endswith(".weight")
        }

    @property
    def architecture(self) -> str:
        """The name that presets go by."""
        name = self.config.unet_config.get("image_model", "unet")
        if name == "hunyuan_video" and self.config.unet_config.get("vision_in_dim"):
            return "hunyuan_video_1.5"
        return name


def build_skeleton(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Skeleton | None:
    """The model that ComfyUI would build for these tensors, on the meta device; None if unknown."""
    config = comfy.model_detection.model_config_from_unet(dict(tensors), "", metadata=metadata)
    if config is None:
        return None
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(dict(tensors), "", device="meta")
    names = {id(tensor): key for key, tensor in tensors.items()}
    renamed = config.process_unet_state_dict(dict(tensors))
    module_keys = {names[id(t)]: key for key, t in renamed.items() if id(t) in names}
    return Skeleton(config=config, model=model, module_keys=module_keys)


def decide_layers(
    skeleton: Skeleton, tensors: Mapping[str, Tensor], policy: Fp8Policy
) -> dict[str, Decision]:
    """A decision for the weight of every Linear, by its key in the file."""
    linears = {
        name for name, module in skeleton.model.diffusion_model.named_modules() if is_linear(module)
    }
    keys = {
        skeleton.module_keys.get(key, "").removesuffix(".weight"): key
        for key in tensors
        if key.endswith(".weight")
    }
    names = [name for name in keys if name in linears]
    decided = policy.decide(names, skeleton.architecture)
    return {keys[name]: decided[name] for name in names}
