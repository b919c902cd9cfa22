import comfy.sample
import comfy.samplers
import pytest
import torch
from tiny_models import MODELS, build, conditioning, latent


@pytest.mark.parametrize("name", MODELS)
def test_every_tiny_model_samples_to_finite_latents(name):
    noise = latent(name)
    with torch.inference_mode():
        out = comfy.sample.sample(
            build(name),
            noise,
            2,
            2.0,
            "euler",
            "simple",
            conditioning(name, 0),
            conditioning(name, 1),
            torch.zeros_like(noise),
            seed=0,
        )
    assert out.shape == noise.shape and torch.isfinite(out).all()
