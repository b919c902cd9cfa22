import contextlib

import comfy.ldm.flux.layers
import comfy.model_management
import comfy.ops
import pytest
import torch
from denoiser_cases import (
    TRANSFORMERS,
    batch,
    build_fp8,
    gradients,
    loss_of,
    network_for,
    plain_autograd,
    relative_error,
    training,
)
from tiny_models import build, conditioning, latent

from comfyui_braid.engine.comfyui.differentiable.denoiser import training_session

ALL = (*TRANSFORMERS, "sd15")


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_every_layer_equal_plain_autograds_under_the_guard(name):
    ours = gradients(build(name), name, everything=True)
    assert relative_error(ours, plain_autograd(build(name), name)) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_gradients_with_checkpointing_equal_those_without(name):
    without = gradients(build(name), name)
    with_ = gradients(build(name), name, gradient_checkpointing=True)
    assert relative_error(with_, without) < 1e-5
    assert any(g is not None and g.abs().max() > 0 for g in without.values())


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients_agree_with_finite_differences_in_float64(name, checkpointing):
    patcher = build(name, torch.float64)
    hooks = [
        module.register_forward_hook(lambda m, i, output: output.double())
        for module in patcher.model.modules()
        if isinstance(module, comfy.ldm.flux.layers.EmbedND)  # else rope is rounded to float32
    ]
    with training(patcher, dtype=torch.float64, gradient_checkpointing=checkpointing) as (
        denoiser,
        network,
    ):
        network.double()
        data = batch(denoiser, name, dtype=torch.float64)
        loss_of(denoiser, *data).backward()
        parameters = [p for p in network.parameters() if p.grad is not None]
        generator = torch.Generator().manual_seed(3)
        directions = [parameters, *([p] for p in parameters[:: max(1, len(parameters) // 6)])]
        for moved in directions:
            direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in moved]
            expected = central_difference(denoiser, data, moved, direction)
            found = sum((p.grad * d).sum() for p, d in zip(moved, direction, strict=True))
            assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-10)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def central_difference(denoiser, data, parameters, direction, step=1e-5):
    losses = []
    for sign in (1, -2):  # to +step, then to -step
        for parameter, d in zip(parameters, direction, strict=True):
            parameter += sign * step * d
        losses.append(float(loss_of(denoiser, *data)))
    for parameter, d in zip(parameters, direction, strict=True):
        parameter += step * d
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_weights_made_under_inference_mode_give_the_same_gradients_inside_the_executor(
    name, checkpointing
):
    expected = gradients(build(name), name, gradient_checkpointing=checkpointing)
    with torch.inference_mode():
        patcher = build(name)
        assert patcher.model.diffusion_model.state_dict()
        assert next(patcher.model.parameters()).is_inference()
        found = gradients(patcher, name, gradient_checkpointing=checkpointing)
    assert relative_error(found, expected) == 0


@pytest.mark.parametrize(
    ("name", "inference"),
    [*((name, True) for name in TRANSFORMERS), ("flux", False)],  # the executor's mode for all
)
@pytest.mark.parametrize("weights", ["bf16", "fp8", "fp8 without scales"])
def test_low_precision_bases_differentiate_with_and_without_checkpointing(name, weights, inference):
    builders = {
        "bf16": lambda: build(name, torch.bfloat16),
        "fp8": lambda: build_fp8(name),
        "fp8 without scales": lambda: build(name, torch.float8_e4m3fn),
    }
    found = []
    for checkpointing in (False, True):
        with torch.inference_mode(inference):
            patcher = builders[weights]()
            found.append(
                gradients(patcher, name, dtype=torch.bfloat16, gradient_checkpointing=checkpointing)
            )
    assert relative_error(found[1], found[0]) < 1e-5
    assert all(g is None or torch.isfinite(g).all() for g in found[0].values())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_fp8_base_has_the_gradients_of_its_dequantised_twin(name):
    patcher, twin = build_fp8(name, torch.float32), build(name)
    state = twin.model.diffusion_model.state_dict()
    weights = dict(patcher.model.diffusion_model.named_parameters())
    with torch.no_grad():
        for key, value in state.items():
            weight = weights.get(key, value)
            value.copy_(weight.dequantize() if hasattr(weight, "dequantize") else weight)
    assert relative_error(gradients(patcher, name), gradients(twin, name)) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_two_runs_with_one_seed_give_the_same_bytes(checkpointing):
    spec = dict(neuron_dropout=0.3, rank_dropout=0.2, module_dropout=0.1)
    runs = [
        gradients(build("flux"), "flux", gradient_checkpointing=checkpointing, spec=spec)
        for _ in range(2)
    ]
    for name, grad in runs[0].items():
        assert (grad is None and runs[1][name] is None) or torch.equal(grad, runs[1][name])


def test_dropout_drops_the_same_when_a_block_is_run_again():
    spec = dict(neuron_dropout=0.3, rank_dropout=0.2)
    without = gradients(build("flux"), "flux", spec=spec)
    after = torch.rand(3)
    with_ = gradients(build("flux"), "flux", spec=spec, gradient_checkpointing=True)
    assert relative_error(with_, without) < 1e-5
    assert torch.equal(torch.rand(3), after)  # and the run goes on with the same random numbers


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients_accumulate_over_two_backward_passes(checkpointing):
    with training(build("flux"), gradient_checkpointing=checkpointing) as (denoiser, network):
        data = batch(denoiser, "flux")
        loss_of(denoiser, *data).backward()
        once = {n: p.grad.clone() for n, p in network.named_parameters()}
        loss_of(denoiser, *data).backward()
        twice = {n: p.grad / 2 for n, p in network.named_parameters()}
    assert relative_error(twice, once) < 1e-6


@pytest.mark.parametrize("name", ["lumina2", "qwen_image", "hunyuan_video"])
def test_prompts_of_different_lengths_in_one_batch_equal_the_mean_of_single_steps(name):
    with training(build(name)) as (denoiser, network):
        items = [
            denoiser.prepare(latent(name, 1, i), conditioning(name, i, tokens))
            for i, tokens in enumerate((6, 9, 6))
        ]
        latents = torch.cat([item[0] for item in items])
        noise, t = torch.randn(latents.shape), torch.tensor([0.2, 0.5, 0.8])
        conds = [item[1] for item in items]
        loss_of(denoiser, latents, noise, t, conds).backward()
        together = {n: p.grad for n, p in network.named_parameters()}
        assert denoiser.forward_calls == 2
        network.zero_grad(set_to_none=True)
        for i in range(3):
            one = slice(i, i + 1)
            loss = loss_of(denoiser, latents[one], noise[one], t[one], conds[one])
            (loss / 3).backward()
        assert relative_error({n: p.grad for n, p in network.named_parameters()}, together) < 1e-5


def test_nothing_before_the_first_adapter_is_tracked_and_the_latent_needs_no_gradient():
    name = "flux"
    with training_session(build(name), compute_dtype=torch.float32) as denoiser:
        data = batch(denoiser, name)
        noised = denoiser.noised_input(*data[:3])
        assert not denoiser.raw_output(noised, *data[2:]).requires_grad
        tracked = []
        last = denoiser.diffusion_model.single_blocks[-1]
        network = network_for(denoiser)
        for block in denoiser.diffusion_model.single_blocks:
            block.register_forward_hook(lambda m, i, output: tracked.append(output.requires_grad))
        hooks = [last.linear2.register_forward_hook(lambda m, i, output: output + delta(i[0]))]
        adapter = next(network.adapters[k] for k in network.adapters if "linear2" in k)

        def delta(x):
            return adapter.delta(x)

        with contextlib.ExitStack() as undo:
            undo.callback(hooks[0].remove)
            assert denoiser.raw_output(noised, *data[2:]).requires_grad
        assert tracked == [False, False, False, True]
        for block in denoiser.diffusion_model.single_blocks:
            block._forward_hooks.clear()


class ForeignTensor(torch.Tensor):
    """Spreads to what is computed with it and cannot be copied, as the weights of a GGUF file."""

    def clone(self, *args, **kwargs):
        return self


class UnpackingLinear(comfy.ops.manual_cast.Linear):
    """A layer of another pack: its weight is bytes of another shape, which it unpacks itself."""

    def cast_bias_weight(self, input=None, dtype=None, device=None, bias_dtype=None):
        packed, step = self.weight.view(2, -1), self.step
        weight = packed[0].to(device, dtype).add(packed[1].to(device, dtype), alpha=1 / 128) * step
        bias = None if self.bias is None else self.bias.to(device, bias_dtype)
        return weight.view(self.out_features, self.in_features), bias

    def forward_comfy_cast_weights(self, input):
        return torch.nn.functional.linear(input, *self.cast_bias_weight(dtype=input.dtype))


def packed_and_plain(name):
    """The tiny model with its linears packed, all its tensors foreign; and one that has the same
    weights in plain tensors."""
    packed, plain = build(name), build(name)
    with torch.inference_mode():
        for key, module in packed.model.diffusion_model.named_modules():
            # of the first layer of FLUX the host reads the weight's shape
            if isinstance(module, torch.nn.Linear) and key != "img_in":
                module.__class__ = UnpackingLinear
                module.step = float(module.weight.abs().max()) / 127
                coarse = (module.weight / module.step).trunc()
                fine = ((module.weight / module.step - coarse) * 128).trunc()
                module.weight = frozen_parameter(torch.stack([coarse, fine]).to(torch.int8))
                twin = plain.model.diffusion_model.get_submodule(key)
                twin.weight.copy_(module.cast_bias_weight(dtype=torch.float32)[0])
            for own, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[own] = frozen_parameter(tensor.as_subclass(ForeignTensor))
    return packed, plain


def frozen_parameter(tensor):
    return torch.nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_layers_of_another_pack_that_unpack_their_weights_give_the_gradients_of_plain_ones(
    name, checkpointing
):
    packed, plain = packed_and_plain(name)
    found = gradients(packed, name, gradient_checkpointing=checkpointing)
    assert relative_error(found, gradients(plain, name)) < 1e-5
    assert {type(g) for g in found.values()} <= {torch.Tensor, type(None)}
