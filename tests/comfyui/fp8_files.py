"""Tiny models as files on disk, and one way to sample them all."""

import comfy.model_detection
import comfy.sample
import comfy.sd
import torch
from safetensors.torch import save_file
from tiny_models import MODELS, build, sampled

ARCHITECTURES = ("flux", "wan", "qwen_image", "hunyuan_video")


def detect_tiny(monkeypatch, name):
    """Some tiny models have head counts that detection assumes fixed: tell it the real ones."""
    config = MODELS[name].unet_config
    monkeypatch.setattr(
        comfy.model_detection, "detect_unet_config", lambda *args, **kwargs: dict(config)
    )


def state_dict(name, dtype=torch.bfloat16):
    model = build(name, dtype=dtype).model.diffusion_model
    return {key: tensor.contiguous() for key, tensor in model.state_dict().items()}


def write_model(folder, monkeypatch, name="flux", dtype=torch.bfloat16):
    detect_tiny(monkeypatch, name)
    path = folder / f"{name}.safetensors"
    save_file(state_dict(name, dtype), path)
    return path


def sample(patcher, name="flux", steps=2, seed=0):
    return sampled(patcher, name, steps=steps, seed=seed)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def reference(path):
    """The same file through ComfyUI's own loader, in its own precision."""
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path))


def lora_state_dict(key_format, rank=4, size=0.4, seed=3):
    """A LoRA on two FLUX layers, in one of the key formats users have."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"double_blocks.0.img_attn.proj": (128, 128), "single_blocks.1.linear2": (128, 640)}
    names = {
        "comfyui": ("diffusion_model.{}", "lora_A", "lora_B"),
        "kohya": ("lora_unet_{}", "lora_down", "lora_up"),
        "diffusers": ("transformer.{}", "lora_A", "lora_B"),
    }
    diffusers = {
        "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
        "single_blocks.1.linear2": "single_transformer_blocks.1.proj_out",
    }
    prefix, down, up = names[key_format]
    lora = {}
    for layer, (out, width) in shapes.items():
        name = diffusers[layer] if key_format == "diffusers" else layer
        stem = prefix.format(name.replace(".", "_") if key_format == "kohya" else name)
        lora[f"{stem}.{down}.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
        lora[f"{stem}.{up}.weight"] = torch.randn(out, rank, generator=generator) * size * 0.05
        lora[f"{stem}.alpha"] = torch.tensor(float(rank))
    return lora


def same_latent(a, b):
    """Equal up to the rounding of a matmul whose weights lie at another alignment in memory."""
    return torch.allclose(a, b, rtol=0, atol=2e-5)
