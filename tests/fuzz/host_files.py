"""The smallest model that ComfyUI knows, LoRAs for it, and what loads and saves them."""

import functools
import json
from pathlib import Path
from random import Random

import safetensors.torch
import torch
from torch import Tensor

from comfyui_braid.engine.checkpoints import AdapterStateDict
from comfyui_braid.engine.comfyui.fp8.loader import Fp8Request, load_fp8
from comfyui_braid.engine.files import read_header, read_tensors
from comfyui_braid.engine.fp8.model_file import comfy_quant
from comfyui_braid.engine.fp8.policy import Fp8Policy
from comfyui_braid.engine.network.keys import KEY_FORMATS
from comfyui_braid.engine.playground.model import Flux, FluxShape
from comfyui_braid.nodes.network import BraidSaveLora

from . import files
from .containers import mutated_container
from .places import output_in
from .target import Target, container, written

POLICY = Fp8Policy(granularity="channel")


@functools.cache
def flux() -> dict[str, Tensor]:
    """The smallest FLUX that ComfyUI knows by its tensors."""
    torch.manual_seed(0)
    model = Flux(FluxShape(depth=1, depth_single_blocks=1))
    return {name: tensor.detach().bfloat16() for name, tensor in model.state_dict().items()}


@functools.cache
def flux_files() -> list[bytes]:
    """In bf16; in FP8 with markers; in FP8 with a header, as a part of a full checkpoint."""
    scaled, layers = dict(flux()), {}
    for name, tensor in flux().items():
        if name.endswith(".weight") and tensor.ndim == 2 and "_blocks." in name:
            layer = name.removesuffix(".weight")
            scaled |= {name: tensor.to(files.FP8), f"{layer}.weight_scale": torch.tensor(1.0)}
            layers[f"model.diffusion_model.{layer}"] = {"format": "float8_e4m3fn"}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    markers = {f"{name[22:]}.comfy_quant": comfy_quant("float8_e4m3fn") for name in layers}
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in scaled.items()}
    kinds = [(flux(), {}), (scaled | markers, {}), (whole, header)]
    return [safetensors.torch.save(tensors, metadata) for tensors, metadata in kinds]


@functools.cache
def loras() -> list[bytes]:
    """For the layers of that FLUX, in two key formats."""
    found = []
    for stem in ("diffusion_model.single_blocks.0.linear2", "lora_unet_single_blocks_0_linear2"):
        tensors = {f"{stem}.lora_down.weight": torch.randn(2, 640) / 100}
        tensors |= {
            f"{stem}.lora_up.weight": torch.randn(128, 2),
            f"{stem}.alpha": torch.tensor(1.0),
        }
        found.append(safetensors.torch.save(tensors, {"ss_steps": "1"}))
    return found


def load_model(data: bytes, folder: Path) -> None:
    with torch.inference_mode():
        load_fp8(Fp8Request(path=written(data, folder), policy=POLICY))


def merge_lora(data: bytes, folder: Path) -> None:
    model = written(flux_files()[0], folder, "flux.safetensors")
    with torch.inference_mode():
        load_fp8(Fp8Request(path=model, policy=POLICY, lora=written(data, folder)))


def mutated_lora(rng: Random) -> bytes:
    """A byte that chooses how it is saved, then the file."""
    return bytes([rng.randrange(256)]) + mutated_container(rng, files.adapters())


def save_again(data: bytes, folder: Path) -> None:
    """A LoRA that another node has loaded, whatever is in it, through Save LoRA."""
    path = written(data[1:], folder)
    state = AdapterStateDict(read_tensors(path), read_header(path).metadata)
    key_format = list(KEY_FORMATS)[data[0] % len(KEY_FORMATS)]
    with output_in(folder):
        BraidSaveLora.execute(state, "damaged", key_format, ("keep", "bf16")[data[0] % 2])


HOST_FILES = (
    Target(
        name="fp8_loader",
        make=container(flux_files),
        read=load_model,
        is_file=True,
        long=2000,
    ),
    Target(name="fp8_lora", make=container(loras), read=merge_lora, is_file=True, long=2000),
)
STRANGE_LORAS = Target(
    name="strange_loras", make=mutated_lora, read=save_again, is_file=False, long=4000
)
"""What another pack hands on has no file's name to say."""
