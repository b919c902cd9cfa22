"""LoRA patches on FP8 weights: applied when a weight is dequantised, instead of rounded into FP8.

ComfyUI merges a LoRA into an FP8 weight by dequantising, adding and quantising again with
stochastic rounding. That keeps the LoRA on average and adds its noise to the picture. Weights in
Braid's layout are dequantised for every multiplication anyway, so the patch is added there, in
float32, for the price of the low-rank product.
"""

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import (
    LazyCastingParamPiece,
    LazyCastingQuantizedParam,
    LowVramPatch,
    ModelPatcher,
)
from comfy.patcher_extension import CallbacksMP
from torch import Tensor, nn

from .layout import is_fine

KEY = "braid.fp8_lora"


class PatchOnTheFly:
    """One weight's patches, as a weight function of its module."""

    def __init__(self, key: str, patches: list, module: nn.Module) -> None:
        self.key = key
        self.patches = patches
        self.module = module

    def __call__(self, weight: Tensor) -> Tensor:
        """`weight` with the patches added in float32, in its own dtype."""
        if any(isinstance(f, LowVramPatch) for f in _weight_functions(self.module)):
            return weight  # partially unloaded since: ComfyUI's own patch does it now
        patched = comfy.lora.calculate_weight(
            self.patches, weight.to(torch.float32), self.key, intermediate_dtype=torch.float32
        )
        return patched.to(weight.dtype)


class Fp8ModelPatcher(ModelPatcher):
    """A ModelPatcher that saves with their patches the weights that are patched on the fly."""

    def model_state_dict_for_saving(
        self, model: nn.Module | None = None, prefix: str = ""
    ) -> dict[str, Tensor]:
        """As ComfyUI's, which takes the weight of a loaded module for patched already.

        The patches are rounded into FP8 as ComfyUI rounds them, each when its tensor is written.
        """
        saved = super().model_state_dict_for_saving(model, prefix)
        for name, module in (model or self.model).named_modules():
            if not any(isinstance(f, PatchOnTheFly) for f in _weight_functions(module)):
                continue
            weight = LazyCastingQuantizedParam(self, f"{prefix}{name}.weight")
            for key, tensor in module.weight.state_dict(f"{name}.weight").items():
                saved[key] = LazyCastingParamPiece(weight, prefix + key, tensor)
        return saved


def apply_patches_on_the_fly(patcher: ModelPatcher) -> None:
    """Register the callbacks on `patcher`; its clones take them over."""
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, _after_load)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, _after_detach)
    if type(patcher) is ModelPatcher:  # one with dynamic memory takes no weight for patched
        patcher.__class__ = Fp8ModelPatcher


def _after_load(patcher: ModelPatcher, device_to: torch.device, *_: object) -> None:
    """Take back the weights that were patched by requantising, and patch them on the fly."""
    for key, backup in patcher.backup.items():
        if key not in patcher.patches or not is_fine(backup.weight):
            continue
        module = comfy.utils.get_attr(patcher.model, key.rsplit(".", 1)[0])
        comfy.utils.set_attr_param(patcher.model, key, backup.weight.to(device_to))
        module.weight_function = [
            *_without_ours(module.weight_function),
            PatchOnTheFly(key, patcher.patches[key], module),
        ]


def _after_detach(patcher: ModelPatcher, unpatched: bool) -> None:
    if not unpatched:
        return  # a clone with the same patches takes the loaded weights over as they are
    for module in patcher.model.modules():
        if functions := _weight_functions(module):
            module.weight_function = _without_ours(functions)


def _weight_functions(module: nn.Module) -> list:
    return module.__dict__.get("weight_function", [])


def _without_ours(functions: list) -> list:
    return [function for function in functions if not isinstance(function, PatchOnTheFly)]
