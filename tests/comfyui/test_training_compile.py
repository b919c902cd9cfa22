"""Blocks through torch.compile: the same losses, the MODEL as it was, and a way back."""

import collections
import dataclasses
import logging
import shutil

import comfy.sd
import pytest
import torch
from fp8_files import write_model
from tiny_models import MODELS, build, sampled
from training_cases import PLAN, run, trained_on

from comfyui_braid.engine.comfyui.differentiable.compilation import compiled
from comfyui_braid.engine.comfyui.fp8.loader import Fp8Request, load_fp8
from comfyui_braid.engine.fp8.policy import Fp8Policy
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns
from comfyui_braid.engine.training.options import Compilation, TrainingOptions

SHORT = dataclasses.replace(PLAN, steps=2, batch_size=1)


def options(**changes):
    return TrainingOptions(compilation=Compilation(**{"dynamo_backend": "aot_eager", **changes}))


@pytest.fixture(autouse=True)
def _no_compiled_code_left():
    yield
    torch._dynamo.reset()


BLOCKS = {"flux": 6, "wan": 3, "qwen_image": 2, "lumina2": 4}


@pytest.mark.parametrize(
    "name, checkpointing",
    [("flux", False), ("flux", True), ("wan", False), ("qwen_image", True), ("lumina2", False)],
)
def test_a_compiled_run_has_the_losses_of_a_plain_one_and_leaves_the_model_alone(
    name, checkpointing, tmp_path
):
    plan = dataclasses.replace(SHORT, gradient_checkpointing=checkpointing)
    plain = run(name, tmp_path, plan=plan)
    with torch.inference_mode():
        patcher = build(name)
    before = sampled(patcher, name)
    weights = dict(patcher.model.named_parameters())
    limit = torch._dynamo.config.cache_size_limit
    with torch.inference_mode():
        trained = trained_on(patcher, name, tmp_path, plan=plan, options=options())
    assert trained.report["compiled"] == f"{BLOCKS[name]} blocks"
    assert trained.loss_map["loss"] == pytest.approx(plain.loss_map["loss"], rel=1e-5)
    assert torch.equal(sampled(patcher, name), before)
    assert all(weights[key] is p for key, p in patcher.model.named_parameters())
    assert not any("forward" in vars(module) for module in patcher.model.modules())
    assert torch._dynamo.config.cache_size_limit == limit


def test_every_step_runs_compiled_code_also_where_blocks_change_their_inputs_in_place(tmp_path):
    """Inductor's partition saves what the next FLUX block would change: then torch compiles nothing
    more. The backend has that partition and needs no C++ compiler."""
    runs = collections.Counter()
    partitioned = torch._dynamo.lookup_backend("aot_eager_decomp_partition")

    def counted(graph, inputs):
        code = partitioned(graph, inputs)
        return lambda *args: runs.update(["block"]) or code(*args)

    torch._dynamo.register_backend(counted, name="counted")
    plan = dataclasses.replace(SHORT, gradient_checkpointing=False, steps=3)
    plain = run("flux", tmp_path, plan=plan)
    trained = run("flux", tmp_path, plan=plan, options=options(dynamo_backend="counted"))
    assert trained.loss_map["loss"] == pytest.approx(plain.loss_map["loss"], rel=1e-5)
    assert trained.report["compiled"] == "6 blocks" and runs["block"] == 6 * 3


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler on a CPU")
def test_torchs_own_compiler_gives_the_losses_of_a_plain_run(tmp_path, monkeypatch):
    """A single block, because each of its kernels is a call of the C++ compiler."""
    single = {**MODELS["flux"].unet_config, "depth": 0, "depth_single_blocks": 1}
    monkeypatch.setitem(MODELS, "flux", dataclasses.replace(MODELS["flux"], unet_config=single))
    plan = dataclasses.replace(SHORT, gradient_checkpointing=False)
    plain = run("flux", tmp_path, plan=plan)
    trained = run("flux", tmp_path, plan=plan, options=options(dynamo_backend="inductor"))
    assert trained.report["compiled"] == "1 blocks"
    assert trained.loss_map["loss"] == pytest.approx(plain.loss_map["loss"], rel=1e-5)


def test_a_model_that_autograd_must_be_guarded_on_says_that_it_is_not_compiled(
    tmp_path, monkeypatch
):
    """Under torch's guard nothing is compiled, in silence."""
    differs = "comfyui_braid.engine.comfyui.differentiable.denoiser.differentiates"
    monkeypatch.setattr(differs, lambda outputs: False)
    plan = dataclasses.replace(SHORT, gradient_checkpointing=False)
    plain = run("flux", tmp_path, plan=plan)
    trained = run("flux", tmp_path, plan=plan, options=options())
    assert "changes what autograd has saved" in trained.report["compiled"]
    assert trained.loss_map["loss"] == pytest.approx(plain.loss_map["loss"], rel=1e-5)


def test_code_of_a_block_without_adapters_never_serves_a_block_with_them(tmp_path):
    """Torch leaves hooks out of its guards; without ours the adapters would not be trained."""
    adapted = TargetPatterns(mode="whitelist", include=(r".*single_blocks\.[23]\..*",))
    plan = dataclasses.replace(SHORT, gradient_checkpointing=False)
    changes = {"plan": plan, "network": NetworkSpec(rank=4, alpha=4, targets=adapted)}
    plain = run("flux", tmp_path, **changes)
    trained = run("flux", tmp_path, **changes, options=options())
    assert trained.report["compiled"] == "6 blocks"
    for key, tensor in plain.lora.items():
        torch.testing.assert_close(trained.lora[key], tensor, rtol=1e-3, atol=1e-5)
    assert any("lora_up" in key or "lora_B" in key for key in plain.lora)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_on_an_fp8_base_a_run_finishes_with_the_losses_of_an_uncompiled_one(
    granularity, tmp_path, monkeypatch
):
    path = write_model(tmp_path, monkeypatch, "flux")
    request = Fp8Request(path=path, policy=Fp8Policy(granularity=granularity))
    trained = []
    for options_ in (TrainingOptions(), options()):
        with torch.inference_mode():
            patcher = load_fp8(request).patcher
            trained.append(
                trained_on(patcher, "flux", tmp_path / "loras", plan=SHORT, options=options_)
            )
    plain, compiled_ = trained
    assert compiled_.loss_map["loss"] == pytest.approx(plain.loss_map["loss"], rel=1e-4)
    assert compiled_.report["compiled"] == "6 blocks"


def test_a_model_with_a_lora_on_it_compiles_with_that_lora(tmp_path):
    first = run("flux", tmp_path, plan=SHORT)
    losses = []
    for options_ in (TrainingOptions(), options()):
        with torch.inference_mode():
            patcher, _ = comfy.sd.load_lora_for_models(build("flux"), None, first.lora, 8.0, 0.0)
            trained = trained_on(patcher, "flux", tmp_path, plan=SHORT, options=options_)
            losses.append(trained.loss_map["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] != pytest.approx(first.loss_map["loss"], rel=1e-5)
    assert trained.report["compiled"] == "6 blocks"


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

    monkeypatch.setattr(
        "comfyui_braid.engine.comfyui.differentiable.denoiser.ComfyDenoiser.noised_input", broken
    )
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
