"""Noise levels, noised inputs and targets of every kind of model ComfyUI samples with.

A model's `model_sampling` object defines what its network is given and what its answer means. All
of it follows from that object's own methods; nothing is looked up by architecture.

`t` in [0, 1] is the noise level of training, 1 = pure noise, one per item of a batch.
"""

from typing import Protocol

import comfy.model_management
import torch
from comfy.model_sampling import (
    CONST,
    COSMOS_RFLOW,
    IMG_TO_IMG,
    IMG_TO_IMG_FLOW,
)
from torch import Tensor


class ModelSampling(Protocol):
    """What is used of a model's `model_sampling`."""

    sigmas: Tensor
    """The sigma of every timestep, rising."""
    sigma_min: Tensor
    sigma_max: Tensor

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor) -> Tensor:
        """What the sampler starts from at that sigma."""

    def calculate_denoised(
        self, sigma: Tensor, model_output: Tensor, model_input: Tensor
    ) -> Tensor:
        """The picture that an output of the network means."""


def check_trainable(sampling: ModelSampling) -> None:
    """Raise `ValueError` for a model that is not trained by removing noise."""
    if isinstance(sampling, (IMG_TO_IMG, IMG_TO_IMG_FLOW)):
        raise ValueError(
            "this model maps an image to an image in one step and knows no noise levels; "
            "a LoRA can be trained on models that remove noise (flow, epsilon, v or EDM)"
        )


def sigma_at(sampling: ModelSampling, t: Tensor) -> Tensor:
    """ComfyUI's sigma (B,) of noise level `t` (B,).

    Flow models: sigma = t, never shifted a second time. Models with a table of sigmas: the entry at
    index 1000 t, so that the network is given exactly the noise its timestep says.
    """
    if isinstance(sampling, CONST):
        return t
    if isinstance(sampling, COSMOS_RFLOW):  # its sigma is the odds of flow time
        return (t / (1 - t)).clamp(float(sampling.sigma_min), float(sampling.sigma_max))
    levels = sampling.sigmas.to(t)
    index = (t * len(levels)).long().clamp(0, len(levels) - 1)
    return levels[index]


def noised_input(sampling: ModelSampling, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t (B, C, ...) as the sampler would hold it; for flow models (1 - t) latents + t noise."""
    return sampling.noise_scaling(sigma_at(sampling, t), noise, latents)


def target(sampling: ModelSampling, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The network output (B, C, ...) for which the model's denoised prediction is `latents`.

    noise - latents for flow models, noise for epsilon, velocity for v-prediction and so on: every
    `calculate_denoised` is a(sigma) x + b(sigma) output, solved for the output here.
    """
    if isinstance(sampling, CONST):
        return noise * getattr(sampling, "noise_scale", 1.0) - latents
    exact = comfy.model_management.supports_fp64(latents.device)
    dtype = torch.float64 if exact else torch.float32
    sigma = sigma_at(sampling, t).to(dtype)
    x = sampling.noise_scaling(sigma, noise.to(dtype), latents.to(dtype))
    zeros = torch.zeros_like(x)
    part_of_x = sampling.calculate_denoised(sigma, zeros, x)
    gain = sampling.calculate_denoised(sigma, torch.ones_like(x), zeros)
    return ((latents.to(dtype) - part_of_x) / gain).to(latents.dtype)
