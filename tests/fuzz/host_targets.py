"""What is read, and what reads it, inside a real ComfyUI: import it first (`host.inprocess`)."""

import json
from pathlib import Path
from random import Random
from typing import Any

import torch

from comfyui_braid.engine.checkpoints import AdapterStateDict
from comfyui_braid.nodes.ema.nodes import parse_sigma_rels
from comfyui_braid.nodes.magcache.inputs import load_calibration
from comfyui_braid.nodes.network import BraidSaveLora
from comfyui_braid.nodes.outputs import next_file
from comfyui_braid.nodes.owner import allowed_optimizers, settings_file
from comfyui_braid.nodes.timesteps.fields import MODE_FIELDS
from comfyui_braid.nodes.timesteps.nodes import build_sampling
from comfyui_braid.nodes.training.checkpoints import BraidLoadCheckpoints
from comfyui_braid.nodes.training.optimizer import CUSTOM, BraidOptimizer

from . import files
from .host_files import HOST_FILES as MODEL_FILES
from .host_files import STRANGE_LORAS
from .mutate import FLOATS, NUMBERS, mutated_bytes, mutated_json
from .places import apart_in, output_in
from .questions import SAMPLING, ask, mutated_question
from .target import Target, text, written
from .typed import TYPED
from .widgets import mutated_node, optimise, run_node

OWNER = {"optimizers": ["transformers.optimization.LayerWiseDummyOptimizer", "a.B"]}


def choose_optimizer(
    optimizer_args: str = "",
    schedule: str = "constant",
    lr_scheduler_args: str = "",
    name: str = "AdamW",
    optimizer_class: str = "",
) -> None:
    """The node, and two steps with what it gives."""
    output = BraidOptimizer.execute(
        name, optimizer_args, schedule, 0.0, lr_scheduler_args, optimizer_class
    )
    optimise(output.result[0])


def mutated_settings(rng: Random) -> bytes:
    if rng.random() < 0.3:
        data = json.dumps(OWNER).encode()
        return mutated_bytes(rng, data, data)
    return mutated_json(rng, OWNER).encode("utf-8", "surrogatepass")


def read_settings(data: bytes, folder: Path) -> None:
    with apart_in(folder, "damaged"):
        settings_file().parent.mkdir()
        settings_file().write_bytes(data)
        allowed_optimizers()


def name_optimizer(typed: str, folder: Path) -> None:
    """A class that the owner of the server has never heard of."""
    with apart_in(folder, "user"):
        choose_optimizer(name=CUSTOM, optimizer_class=typed)


def name_file(prefix: str, folder: Path) -> None:
    with output_in(folder):
        path = next_file(prefix, ".safetensors")
    assert path.resolve().is_relative_to(folder.resolve()), f"{prefix!r} leads to {path}"


def save_lora(metadata: str, folder: Path) -> None:
    state = AdapterStateDict(files.adapter_state("lora", "comfyui"), {"ss_steps": "1"})
    with output_in(folder):
        BraidSaveLora.execute(state, "loras/x", "comfyui", "keep", metadata)


def open_calibration(name: str, folder: Path) -> None:
    (folder / "magcache").mkdir()
    written(files.calibrations()[0], folder / "magcache", "a.json")
    with output_in(folder):
        load_calibration(name)


def list_folder(typed: str, folder: Path) -> None:
    chosen, _, pattern = typed.partition("|")
    place = folder / "loras" / "run"
    place.mkdir(parents=True)
    written(files.checkpoints()[0], place, "run-step00000100.safetensors")
    with output_in(folder):
        BraidLoadCheckpoints.execute(str(place), pattern or "*.safetensors", "")
        BraidLoadCheckpoints.execute(chosen, "*.safetensors", "")


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


HOST_FILES = (
    *MODEL_FILES,
    Target(name="settings", make=mutated_settings, read=read_settings, is_file=True),
)
HOST_TEXTS = (
    STRANGE_LORAS,
    Target(name="nodes", make=mutated_node, read=run_node, is_file=False, long=6000),
    Target(
        name="optimizer_args",
        make=text(*TYPED["optimizer_args"]),
        read=lambda typed, folder: choose_optimizer(optimizer_args=typed),
        is_file=False,
    ),
    Target(
        name="lr_scheduler_args",
        make=text(*TYPED["lr_scheduler_args"]),
        read=lambda typed, folder: choose_optimizer(schedule="rex", lr_scheduler_args=typed),
        is_file=False,
    ),
    Target(
        name="optimizer_class",
        make=text(*TYPED["optimizer_class"]),
        read=name_optimizer,
        is_file=False,
        long=2000,
    ),
    Target(
        name="sigma_rels",
        make=text(*TYPED["sigma_rels"]),
        read=lambda typed, folder: parse_sigma_rels(typed),
        is_file=False,
    ),
    Target(
        name="filename_prefix",
        make=text(*TYPED["filename_prefix"]),
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
        make=text(*TYPED["file"]),
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
