"""The estimate before a run: what it counts, and that it refuses with numbers."""

import types

import psutil
import pytest
import torch
from tiny_models import build
from training_cases import run

from comfyui_braid.engine.comfyui.differentiable.gradient_checkpointing import find_blocks
from comfyui_braid.engine.comfyui.training.memory import GIB, MemoryEstimate, estimate_memory


def estimate(patcher=None, **changes):
    settings = {
        "parameters": 1000,
        "batch_shape": (2, 16, 16, 16),
        "gradient_checkpointing": True,
        **changes,
    }
    return estimate_memory(patcher or build("flux"), **settings)


def test_weights_adapter_optimizer_and_shadows_are_counted_to_the_byte():
    patcher = build("flux", torch.bfloat16)
    numbers = sum(p.numel() for p in patcher.model.parameters())
    whole = estimate(patcher)
    assert whole.weights == pytest.approx(2 * numbers, rel=0.02)
    assert whole.adapter == 1000 * (4 + 4 + 8)  # weight, gradient, two moments
    assert estimate(patcher, shadows=5).adapter == 1000 * 36
    assert estimate(patcher, offload=True).weights == 0


def test_activations_grow_with_the_batch_and_with_the_blocks_whose_graph_is_kept():
    patcher = build("flux")
    one, two = (estimate(patcher, batch_shape=(n, 16, 64, 64)).activations for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)
    kept = estimate(patcher, gradient_checkpointing=False).activations
    blocks = len(find_blocks(patcher.model.diffusion_model))
    assert kept == pytest.approx(estimate(patcher).activations * (3 + blocks / 2) / 3, rel=0.01)


def test_on_a_cpu_weights_in_memory_are_not_asked_for_again(monkeypatch):
    patcher = build("flux")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10**9))
    assert estimate(patcher).available == 10**9 + patcher.model_size()


def test_a_run_that_cannot_fit_is_refused_with_numbers_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=2**20))
    with pytest.raises(ValueError, match=r"does not fit: .* GiB weights .*available; lower batch"):
        run("flux", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_sentence_adds_up():
    whole = MemoryEstimate(weights=2 * GIB, adapter=GIB, activations=3 * GIB, available=4 * GIB)
    assert "= 6.00 GiB, 4.00 GiB available" in whole.text
