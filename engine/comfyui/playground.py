"""The playground's model as a MODEL of the host."""

import comfy.model_patcher
import comfy.sd

from ..playground.model import WEIGHTS


def load_playground_model() -> comfy.model_patcher.ModelPatcher:
    """The bundled weights through ComfyUI's own loader, which knows them as a FLUX schnell."""
    return comfy.sd.load_diffusion_model(str(WEIGHTS))
