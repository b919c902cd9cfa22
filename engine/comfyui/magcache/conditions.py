"""The conditions of a sampling run, as a calibration records them and a plan compares them."""

import hashlib
from collections.abc import Sequence
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...magcache.plan import Conditions
from .samplers import sampler_name


def network_settings(patcher: ModelPatcher) -> dict[str, Any]:
    """The settings its network was built with."""
    return dict(patcher.model.model_config.unet_config)


def architecture_hash(patcher: ModelPatcher) -> str:
    """12 hex digits over the names and shapes of the network's parameters."""
    digest = hashlib.sha256()
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    return digest.hexdigest()[:12]


def weight_patches(patcher: ModelPatcher) -> str:
    """How many layers LoRAs and the like change, and 8 hex digits over which and how strongly."""
    if not patcher.patches:
        return "none"
    digest = hashlib.sha256()
    for key in sorted(patcher.patches):
        strengths = [patch[0] for patch in patcher.patches[key]]
        digest.update(f"{key}{strengths}".encode())
    return f"{len(patcher.patches)} layers {digest.hexdigest()[:8]}"


def run_conditions(
    guider: comfy.samplers.CFGGuider,
    sampler: comfy.samplers.Sampler,
    sigmas: Sequence[float],
    latent: Tensor,
    measure: str,
) -> Conditions:
    """The conditions of the run that `guider` is about to do on `latent` (B, C, ...)."""
    patcher = guider.model_patcher
    model_sampling = patcher.get_model_object("model_sampling")
    packed = latent.ndim < 4  # several streams in one flat latent
    shift = model_sampling.shift if hasattr(model_sampling, "shift") else None
    return Conditions(
        steps=len(sigmas) - 1,
        sigmas=tuple(sigmas),
        model=type(patcher.model).__name__,
        architecture=architecture_hash(patcher),
        patches=weight_patches(patcher),
        sampler=sampler_name(sampler),
        shift=float(shift) if shift is not None else None,
        resolution=tuple(latent.shape[-1:] if packed else latent.shape[-2:]),
        frames=latent.shape[2] if latent.ndim == 5 else None,
        cfg=float(guider.cfg),
        dtype=str(patcher.model.get_dtype_inference()).removeprefix("torch."),
        measure=measure,
    )


def schedule_knots(patcher: ModelPatcher, steps: int) -> list[float]:
    """Noise levels of a full run on this model: where a published list is taken to lie."""
    model_sampling = patcher.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(model_sampling, "simple", steps).tolist()[:steps]


def skippable(
    patcher: ModelPatcher, sigmas: Sequence[float], start_percent: float, end_percent: float
) -> list[bool]:
    """For every step, whether its noise level lies in the user's range of the sampling process."""
    model_sampling = patcher.get_model_object("model_sampling")
    start = float(model_sampling.percent_to_sigma(start_percent))
    end = float(model_sampling.percent_to_sigma(end_percent))
    return [end < sigma <= start for sigma in sigmas[:-1]]
