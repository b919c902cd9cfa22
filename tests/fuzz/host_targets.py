"""What is read, and what reads it, inside a real ComfyUI: import it first (`host.inprocess`)."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import folder_paths
import safetensors.torch
import torch
from host.texts import english
from torch import Tensor

from comfyui_braid.engine.checkpoints import AdapterStateDict
from comfyui_braid.engine.comfyui.fp8.loader import Fp8Request, load_fp8
from comfyui_braid.engine.fp8.model_file import comfy_quant
from comfyui_braid.engine.fp8.policy import Fp8Policy
from comfyui_braid.engine.playground.model import Flux, FluxShape
from comfyui_braid.engine.training.optimizers.optimizer import Optimization
from comfyui_braid.nodes import LIVE, kinds, live
from comfyui_braid.nodes.ema.nodes import parse_sigma_rels
from comfyui_braid.nodes.magcache.inputs import load_calibration
from comfyui_braid.nodes.network import BraidSaveLora
from comfyui_braid.nodes.outputs import next_file
from comfyui_braid.nodes.timesteps.fields import MODE_FIELDS
from comfyui_braid.nodes.timesteps.nodes import build_sampling
from comfyui_braid.nodes.training.checkpoints import BraidLoadCheckpoints
from comfyui_braid.nodes.training.optimizer import BraidOptimizer

from . import files
from .containers import mutated_container
from .mutate import FLOATS, NUMBERS, mutated_json, mutated_text
from .targets import Target, text, written

POLICY = Fp8Policy(granularity="channel")


@functools.cache
def flux() -> dict[str, Tensor]:
    """The smallest FLUX that ComfyUI knows by its tensors."""
    torch.manual_seed(0)
    model = Flux(FluxShape(depth=1, depth_single_blocks=1))
    return {name: tensor.detach().bfloat16() for name, tensor in model.state_dict().items()}


@functools.cache
def flux_files() -> list[bytes]:
    """In bf16; in FP8 with markers; in FP8 with a header, as a part of a whole model."""
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


@contextmanager
def output_in(folder: Path) -> Iterator[None]:
    """Inside, ComfyUI's output folder is `folder`."""
    before = folder_paths.output_directory
    folder_paths.set_output_directory(str(folder))
    try:
        yield
    finally:
        folder_paths.set_output_directory(before)


def optimise(
    optimizer_args: str = "", schedule: str = "constant", lr_scheduler_args: str = ""
) -> None:
    """The node, and two steps with what it gives."""
    output = BraidOptimizer.execute("AdamW", optimizer_args, schedule, 0.0, lr_scheduler_args)
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    groups = [{"params": [parameter], "lr": 1e-3, "name": "unet"}]
    optimization = Optimization(output.result[0], groups, 10)
    for _ in range(2):
        parameter.grad = torch.full_like(parameter, 0.1)
        optimization.optimizer.step()
        optimization.advance()


def name_file(prefix: str, folder: Path) -> None:
    with output_in(folder):
        path = next_file(prefix, ".safetensors")
    assert path.resolve().is_relative_to(folder.resolve()), f"{prefix!r} leads to {path}"


def save_lora(metadata: str, folder: Path) -> None:
    state = AdapterStateDict(files.adapter_state("lora", "comfyui"), {"ss_steps": "1"})
    with output_in(folder):
        BraidSaveLora.execute(state, "loras/x", "comfyui", "keep", metadata)


def open_calibration(name: str, folder: Path) -> None:
    with output_in(folder):
        load_calibration(name)


def list_folder(typed: str, folder: Path) -> None:
    chosen, _, pattern = typed.partition("|")
    written(files.checkpoints()[0], folder, "run-step00000100.safetensors")
    with output_in(folder):
        BraidLoadCheckpoints.execute(str(folder), pattern or "*.safetensors", "")
        BraidLoadCheckpoints.execute(chosen, "*.safetensors", "")


SAMPLING = {
    "min_timestep": 0,
    "max_timestep": 1000,
    "preserve_distribution_shape": True,
    "num_timestep_buckets": 4,
}


def mutated_sampling(rng: Random) -> dict[str, Any]:
    """The widgets of Timestep Sampling with any numbers in them: a linked node may give any."""
    values = dict(SAMPLING)
    mode = {"timestep_sampling": rng.choice(list(MODE_FIELDS))}
    for field in MODE_FIELDS[mode["timestep_sampling"]]:
        mode[field.id] = field.default
    for part in (values, mode):
        name = rng.choice(list(part))
        if rng.random() < 0.7 and not isinstance(part[name], str):
            part[name] = rng.choice(FLOATS if isinstance(part[name], float) else NUMBERS)
    return values | {"timestep_sampling": mode}


def sample_timesteps(document: str, folder: Path) -> None:
    sampling = build_sampling(**json.loads(document))
    sampling.distribution(64, 64).from_uniform(torch.linspace(0.0, 0.999, 50))


SAMPLING_NODE = {
    "node_id": "BraidTimestepSampling",
    "values": {
        "timestep_sampling": "shift",
        "timestep_sampling.discrete_flow_shift": 3.0,
        "timestep_sampling.sigmoid_scale": 1.0,
        "timestep_sampling.weighting_scheme": "none",
        **SAMPLING,
    },
    "inputs": {},
}
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("timesteps", SAMPLING_NODE),
    (
        "timesteps",
        {
            "node_id": "BraidTimestepPreview",
            "values": {"width": 64, "height": 64, "bins": 10, "samples": 1000, "seed": 0},
            "inputs": {"timesteps": SAMPLING_NODE},
        },
    ),
    (
        "ema",
        {
            "node_id": "BraidPostHocEma",
            "values": {
                "method": "sigma_rel",
                "method.sigma_rel": 0.2,
                "sort": "step",
                "first": 1,
                "last": 0,
            },
            "inputs": {
                "checkpoints": {
                    "node_id": "BraidTrainLora",
                    "values": {"steps": 100},
                    "inputs": {
                        "options": {
                            "node_id": "BraidCheckpointing",
                            "values": {"save_every_n_steps": 10, "save_last_n": 0},
                            "inputs": {},
                        }
                    },
                }
            },
        },
    ),
    (
        "magcache",
        {
            "node_id": "BraidMagCachePlan",
            "values": {
                "preset": "FLUX.1-dev",
                "mag_ratios": "0",
                "steps": 20,
                "rule": "magcache",
                "rule.threshold": 0.24,
                "rule.retention_ratio": 0.2,
                "rule.k": 6,
                "rule.interpolation": "cumulative",
            },
            "inputs": {},
        },
    ),
]


def mutated_question(rng: Random) -> str:
    """noun, then the body of a question to the live route."""
    noun, body = rng.choice(QUESTIONS)
    document = mutated_json(rng, body)
    return f"{noun} {mutated_text(rng, [document]) if rng.random() < 0.1 else document}"


def ask(question: str, folder: Path) -> None:
    """As the route answers it; a sentence in the answer counts as a refusal."""
    noun, _, body = question.partition(" ")
    with output_in(folder):
        answer = answer_live(noun, body)
    json.dumps(answer, allow_nan=False)
    if sentence := answer.get("error") or answer.get("message"):
        raise ValueError(english(sentence))


def answer_live(noun: str, body: str) -> dict[str, Any]:
    _, answer = live.answer_to(LIVE[noun], noun, kinds(), body.encode(errors="surrogatepass"))
    return json.loads(answer)


HOST_FILES = (
    Target(
        name="fp8_loader",
        make=lambda rng: mutated_container(rng, flux_files()),
        read=load_model,
        is_file=True,
        long=1500,
    ),
    Target(
        name="fp8_lora",
        make=lambda rng: mutated_container(rng, loras()),
        read=merge_lora,
        is_file=True,
        long=1500,
    ),
)
HOST_TEXTS = (
    Target(
        name="optimizer_args",
        make=text("weight_decay=0.01\nbetas=(0.9, 0.99)", "eps=1e-8 amsgrad=True", "fused=None"),
        read=lambda typed, folder: optimise(optimizer_args=typed),
        is_file=False,
    ),
    Target(
        name="lr_scheduler_args",
        make=text("num_cycles=3", "min_lr_ratio=0.1 rex_alpha=0.1", "power=2.0\nlr_end=1e-7"),
        read=lambda typed, folder: optimise(schedule="rex", lr_scheduler_args=typed),
        is_file=False,
    ),
    Target(
        name="sigma_rels",
        make=text("0.05, 0.1, 0.15", "0.2\n0.25", "0.28868"),
        read=lambda typed, folder: parse_sigma_rels(typed),
        is_file=False,
    ),
    Target(
        name="filename_prefix",
        make=text("loras/braid", "a/b c", "%date:yyyy-MM-dd%/x", "x"),
        read=name_file,
        is_file=False,
    ),
    Target(
        name="save_lora",
        make=lambda rng: mutated_json(rng, {"modelspec.author": "me", "a": {"b": [1, None]}}),
        read=save_lora,
        is_file=False,
        long=2000,
    ),
    Target(
        name="calibration_name",
        make=text("a.json", "x/b.json"),
        read=open_calibration,
        is_file=False,
    ),
    Target(
        name="folder",
        make=text("run|*", ".|run*", "/tmp|**/*.safetensors"),
        read=list_folder,
        is_file=False,
    ),
    Target(
        name="timesteps",
        make=lambda rng: json.dumps(mutated_sampling(rng)),
        read=sample_timesteps,
        is_file=False,
    ),
    Target(name="live", make=mutated_question, read=ask, is_file=False),
)
