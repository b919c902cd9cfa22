"""The playground's model as a MODEL of the host."""

import comfy.model_patcher
import comfy.sd

from ..playground.model import WEIGHTS

PLANES, PIXELS = 3, 4
"""Its latents hold red, green, blue and luma of 2 x 2 pixels, plane by plane."""


def load_playground_model() -> comfy.model_patcher.ModelPatcher:
    """The bundled weights through ComfyUI's own loader, which knows them as a FLUX schnell."""
    patcher = comfy.sd.load_diffusion_model(str(WEIGHTS))
    format_ = patcher.model.latent_format
    format_.latent_rgb_factors = latent_rgb_factors()
    format_.latent_rgb_factors_bias = [0.0] * 3
    return patcher


def latent_rgb_factors() -> list[list[float]]:
    """(16, 3): the mean colour of a cell's pixels, exactly, so that previews show true colours.

    ComfyUI's own table for FLUX is fitted to another autoencoder.
    """
    rows = [[0.0] * 3 for _ in range(4 * PIXELS)]
    for plane in range(PLANES):
        for pixel in range(PIXELS):
            rows[plane * PIXELS + pixel][plane] = 1 / PIXELS
    return rows
