"""What the denoiser tests share: FP8 twins of the tiny models, networks, a step, its reference."""

import json
from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from tiny_models import MODELS, build, conditioning, latent

from comfyui_braid.engine.comfyui.differentiable.conditioning import stacked
from comfyui_braid.engine.comfyui.differentiable.denoiser import _attention, training_session
from comfyui_braid.engine.comfyui.differentiable.noise_levels import sigma_at
from comfyui_braid.engine.network.architectures import architecture_of
from comfyui_braid.engine.network.attach import attached, build_network
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns
from comfyui_braid.engine.network.targets import select_targets

TRANSFORMERS = ("flux", "flux_dev", "wan", "qwen_image", "hunyuan_video", "lumina2")


def build_fp8(name: str, dtype: torch.dtype = torch.bfloat16):
    """The tiny model with every 2-D block weight in ComfyUI's native per-tensor FP8."""
    state = build(name, dtype).model.diffusion_model.state_dict()
    for key in [k for k, v in state.items() if k.endswith(".weight") and v.ndim == 2]:
        if ".0." not in key and ".1." not in key:
            continue
        weight = state[key].float()
        scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
        layer = key.removesuffix(".weight")
        state[key] = (weight / scale).to(torch.float8_e4m3fn)
        state[f"{layer}.weight_scale"] = scale
        conf = json.dumps({"format": "float8_e4m3fn"}).encode()
        state[f"{layer}.comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
    tiny = MODELS[name]
    config = getattr(comfy.supported_models, tiny.supported_model)(dict(tiny.unet_config))
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(dtype, dtype)
    model = config.get_model({}, "")
    missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model.to(device), device, device)


def network_for(denoiser, everything: bool = False, rank: int = 4, **spec):
    """A network on the default targets (or on every layer), its up matrices not zero."""
    targets = TargetPatterns(include=(".*",), mode="whitelist") if everything else TargetPatterns()
    spec = NetworkSpec(rank=rank, targets=targets, **spec)
    architecture = architecture_of(denoiser.model.model_config.unet_config)
    report = select_targets(denoiser.diffusion_model, spec, architecture)
    network = build_network(report.selected, spec, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * (0.05 if parameter.ndim > 1 else 1.0))
    return network


@contextmanager
def training(patcher, everything: bool = False, dtype=torch.float32, spec=None, **session):
    """(denoiser, network) with the network attached."""
    with training_session(patcher, compute_dtype=dtype, **session) as denoiser:
        network = network_for(denoiser, everything, **(spec or {}))
        with attached(denoiser.diffusion_model, network):
            yield denoiser, network


def batch(denoiser, name: str, size: int = 2, tokens: int = 6, dtype=torch.float32):
    """(latents, noise, t, conditioning) of a small training batch."""
    items = [
        denoiser.prepare(latent(name, 1, i), conditioning(name, i, tokens)) for i in range(size)
    ]
    latents = torch.cat([latents for latents, _ in items]).to(dtype)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    t = torch.tensor([0.7, 0.31, 0.52, 0.9][:size])
    return latents, noise, t, [conditioning for _, conditioning in items]


def loss_of(denoiser, latents, noise, t, conditioning):
    noised = denoiser.noised_input(latents, noise, t)
    prediction = denoiser.raw_output(noised, t, conditioning)
    return (prediction - denoiser.target(latents, noise, t)).square().mean()


def gradients(patcher, name: str, everything: bool = False, seed: int = 0, **options):
    """The adapter gradients of one step, by parameter name; None where there is none."""
    torch.manual_seed(seed)
    with training(patcher, everything, **options) as (denoiser, network):
        loss_of(denoiser, *batch(denoiser, name)).backward()
        return {n: p.grad for n, p in network.named_parameters()}


def relative_error(given: dict, expected: dict) -> float:
    """‖given - expected‖ / ‖expected‖ over all gradients; the same ones must be None."""
    assert [n for n, g in given.items() if g is None] == [
        n for n, g in expected.items() if g is None
    ]
    names = [n for n, g in expected.items() if g is not None]
    difference = sum((given[n] - expected[n]).double().square().sum() for n in names)
    return float((difference / sum(expected[n].double().square().sum() for n in names)).sqrt())


def plain_autograd(patcher, name):
    """The reference: ComfyUI's own layers under torch's own guard against in-place changes."""
    with training_session(patcher, compute_dtype=torch.float32) as denoiser:
        network = network_for(denoiser, everything=True)
        data = batch(denoiser, name)
        target, noised = denoiser.target(*data[:3]), denoiser.noised_input(*data[:3])
        arguments = stacked(data[3], denoiser.device)
        sigma = sigma_at(denoiser.sampling, data[2])
    model = patcher.model
    seen = []
    hook = model.diffusion_model.register_forward_hook(lambda m, i, output: seen.append(output))
    comfy.model_management.in_training = True
    try:
        with (
            attached(model.diffusion_model, network),
            torch.autograd.graph.allow_mutation_on_saved_tensors(),
        ):
            options = {"optimized_attention_override": _attention}
            model.apply_model(noised, sigma, transformer_options=options, **arguments)
            (seen[-1] - target).square().mean().backward()
    finally:
        comfy.model_management.in_training = False
        hook.remove()
    return {n: p.grad for n, p in network.named_parameters()}


def state_of(patcher):
    """Everything a session could leave behind: attributes, hooks, tensors, flags."""
    modules = {
        name: (
            {k: id(v) for k, v in vars(m).items() if not k.startswith("_") and k != "training"},
            {k: id(v) for k, v in m._parameters.items()},
            {k: id(v) for k, v in m._buffers.items()},
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)),
        )
        for name, m in patcher.model.named_modules()
    }
    flags = (
        comfy.model_management.in_training,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )
    options = repr(patcher.model_options)
    return modules, flags, options, [p.requires_grad for p in patcher.model.parameters()]
