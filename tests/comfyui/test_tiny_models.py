import pytest
import torch
from tiny_models import MODELS, build, latent, sampled


@pytest.mark.parametrize("name", MODELS)
def test_every_tiny_model_samples_to_finite_latents(name):
    out = sampled(build(name), name, cfg=2.0)
    assert out.shape == latent(name).shape and torch.isfinite(out).all()
