"""The residuals that a run remembers."""

import pytest
import torch

from comfyui_braid.engine.magcache.residuals import ResidualCache


def test_residuals_of_one_noise_level_replace_each_other_whatever_its_rounding():
    cache = ResidualCache(extrapolate=True)
    for step, sigma in ((1, 0.9), (5, 0.5), (5, 0.5 * (1 + 1e-6))):
        cache.store("who", step, sigma, torch.full((1,), sigma))
    newest, before, w = cache.line("who", 0.4)
    assert (before.sigma, w) == (0.9, pytest.approx(0.25, rel=1e-4))
    assert newest.sigma != 0.5
