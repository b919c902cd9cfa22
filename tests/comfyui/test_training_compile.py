"""Blocks through torch.compile: the same losses, the MODEL as it was, and a way back."""

import dataclasses
import logging

import pytest
import torch
from test_training_run import PLAN, run, sampled, silent, training
from tiny_models import build

from comfyui_braid.engine.comfyui.compilation import compiled
from comfyui_braid.engine.comfyui.trainer import train_lora
from comfyui_braid.engine.training.options import Compilation, TrainingOptions

SHORT = dataclasses.replace(PLAN, steps=2, batch_size=1)


def options(**changes):
    return TrainingOptions(compilation=Compilation(**{"dynamo_backend": "aot_eager", **changes}))


@pytest.fixture(autouse=True)
def _no_compiled_code_left():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_has_the_losses_of_a_plain_one_and_leaves_the_model_alone(
    checkpointing, tmp_path
):
    plan = dataclasses.replace(SHORT, gradient_checkpointing=checkpointing)
    plain = run("flux", tmp_path, plan=plan)
    with torch.inference_mode():
        patcher = build("flux")
    before = sampled(patcher, "flux")
    weights = {name: p for name, p in patcher.model.named_parameters()}
    limit = torch._dynamo.config.cache_size_limit
    with torch.inference_mode():
        trained = train_lora(
            patcher, training("flux", tmp_path, plan=plan, options=options()), silent
        )
    assert trained.report["compiled"] == "6 blocks"
    assert trained.loss_map["loss"] == pytest.approx(plain.loss_map["loss"], rel=1e-5)
    assert torch.equal(sampled(patcher, "flux"), before)
    assert all(weights[name] is p for name, p in patcher.model.named_parameters())
    assert not any("forward" in vars(module) for module in patcher.model.modules())
    assert torch._dynamo.config.cache_size_limit == limit


def broken_backend(error, at_backward):
    """A backend as torch would register it, which fails when it compiles."""
    from torch._dynamo.backends.common import aot_autograd

    def fail(graph, inputs):
        raise error

    def fine(graph, inputs):
        return graph.forward

    if not at_backward:
        return lambda graph, inputs: fail(graph, inputs)
    return aot_autograd(fw_compiler=fine, bw_compiler=fail)


@pytest.mark.parametrize("at_backward", [False, True])
def test_where_compiling_fails_the_run_goes_on_without_it_and_says_so(
    at_backward, tmp_path, monkeypatch, caplog
):
    backend = broken_backend(RuntimeError("no compiler here"), at_backward)
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: original(f, **{**kw, "backend": backend}))
    plan = dataclasses.replace(SHORT, gradient_checkpointing=False)
    plain = run("flux", tmp_path, plan=plan)
    with caplog.at_level(logging.WARNING, "comfyui_braid"):
        trained = run("flux", tmp_path, plan=plan, options=options())
    assert "goes on without it" in caplog.text and "no compiler here" in caplog.text
    assert "no compiler here" in trained.report["compiled"]
    assert trained.loss_map["loss"] == plain.loss_map["loss"]
    assert trained.loss_map["timesteps"] == plain.loss_map["timesteps"]


def test_an_error_that_is_not_the_compiler_s_is_not_hidden(tmp_path, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("of the denoiser")

    monkeypatch.setattr("comfyui_braid.engine.comfyui.denoiser.ComfyDenoiser.noised_input", broken)
    with pytest.raises(ZeroDivisionError):
        run("flux", tmp_path, plan=SHORT, options=options())


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"dynamo_backend": "inductr"}, "this torch has .*inductor"),
        ({"dynamo_mode": "max-autotune"}, "for the backend inductor"),
    ],
)
def test_a_backend_that_torch_lacks_is_refused_before_training(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        with compiled(torch.nn.Module(), options(**changes).compilation):
            pass
