"""What is read, and what reads it: every file and typed text that needs no ComfyUI."""

import functools
import json
from pathlib import Path
from random import Random

from comfyui_braid.engine.checkpoints import find_checkpoints
from comfyui_braid.engine.fp8.policy import Fp8Policy, LayerPatterns
from comfyui_braid.engine.magcache.plan import plan_from_ratios, read_plan
from comfyui_braid.engine.network.metadata import parse_metadata
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns, parse_network_args
from comfyui_braid.engine.network.targets import select_targets
from comfyui_braid.engine.patterns import parse_patterns
from comfyui_braid.engine.playground.model import Flux, FluxShape
from comfyui_braid.engine.training.plan import TrainingPlan
from comfyui_braid.engine.training.states.saving import find_state, run_folder

from . import files
from .containers import with_checksum
from .mutate import mutated_bytes, mutated_json, mutated_text
from .readers import (
    average_run,
    mutated_shards,
    quantise,
    quantise_shards,
    read_any,
    read_any_adapter,
    read_job,
    rebuild_from_shadows,
    resume,
    use_plan,
)
from .target import Target, container, text, written
from .typed import TYPED


def mutated_calibration(rng: Random) -> bytes:
    data = rng.choice(files.calibrations())
    if rng.random() < 0.3:
        return mutated_bytes(rng, data, rng.choice(files.calibrations()))
    return mutated_json(rng, json.loads(data)).encode("utf-8", "surrogatepass")


def mutated_job(rng: Random) -> str:
    document = mutated_json(rng, json.loads(files.job()))
    return mutated_text(rng, [document]) if rng.random() < 0.1 else document


@functools.cache
def small_flux() -> Flux:
    return Flux(FluxShape(depth=1, depth_single_blocks=1))


def select(patterns: str, folder: Path) -> None:
    exclude = parse_patterns("exclude_patterns", patterns)
    spec = NetworkSpec(targets=TargetPatterns(exclude=exclude, include=exclude))
    select_targets(small_flux(), spec, files.FLUX)


def select_for_fp8(patterns: str, folder: Path) -> None:
    """Apart from the one above: each selection may take its time."""
    exclude = parse_patterns("exclude_patterns", patterns)
    policy = Fp8Policy(patterns=LayerPatterns(include=exclude, exclude=exclude))
    policy.decide([name for name, _ in small_flux().named_modules()], "flux")


def name_output(name: str, folder: Path) -> None:
    plan = TrainingPlan(steps=1, output_name=name)
    where = run_folder(folder, plan.output_name, None)
    assert where.resolve().is_relative_to(folder.resolve()), f"{name!r} leads to {where}"


def list_checkpoints(pattern: str, folder: Path) -> None:
    for name in ("run-step00000100.safetensors", "a/b/run-step00000200.safetensors"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.checkpoints()[0])
    find_checkpoints(folder, pattern)


def find_a_state(typed: str, folder: Path) -> None:
    (folder / "lora").mkdir()
    (folder / "lora" / "lora-step00000002.state").touch()
    find_state(folder, "lora", typed)


FILES = (
    Target(
        name="headers",
        make=container(lambda: [*files.adapters(), *files.models(), *files.shadows()]),
        read=read_any,
        is_file=True,
    ),
    Target(name="adapters", make=container(files.adapters), read=read_any_adapter, is_file=True),
    Target(
        name="checkpoints",
        make=container(files.checkpoints),
        read=average_run,
        is_file=True,
        long=2500,
    ),
    Target(name="shadows", make=container(files.shadows), read=rebuild_from_shadows, is_file=True),
    Target(
        name="states",
        make=container(files.states, with_checksum),
        read=resume,
        is_file=True,
        long=3000,
    ),
    Target(name="models", make=container(files.models), read=quantise, is_file=True),
    Target(name="shards", make=mutated_shards, read=quantise_shards, is_file=True, long=2000),
    Target(
        name="calibrations",
        make=mutated_calibration,
        read=lambda data, folder: use_plan(read_plan(written(data, folder, "damaged.json"))),
        is_file=True,
    ),
)
TEXTS = (
    Target(name="jobs", make=mutated_job, read=read_job, is_file=False),
    Target(
        name="network_args",
        make=text(*TYPED["network_args"]),
        read=lambda typed, folder: parse_network_args(typed),
        is_file=False,
    ),
    Target(
        name="patterns",
        make=text(*TYPED["exclude_patterns"]),
        read=select,
        is_file=False,
        long=3000,
    ),
    Target(
        name="fp8_patterns",
        make=text(*TYPED["include_patterns"], *TYPED["exclude_patterns"]),
        read=select_for_fp8,
        is_file=False,
        long=2000,
    ),
    Target(
        name="mag_ratios",
        make=text(*TYPED["mag_ratios"]),
        read=lambda typed, folder: use_plan(plan_from_ratios(typed)),
        is_file=False,
    ),
    Target(
        name="metadata",
        make=lambda rng: (
            mutated_json(rng, {"modelspec.author": "me", "a": {"b": [1, 2.5, None]}})
            if rng.random() < 0.6
            else mutated_text(rng, TYPED["metadata"])
        ),
        read=lambda typed, folder: parse_metadata(typed),
        is_file=False,
    ),
    Target(
        name="output_name",
        make=text(*TYPED["output_name"]),
        read=name_output,
        is_file=False,
    ),
    Target(name="resume", make=text(*TYPED["resume"]), read=find_a_state, is_file=False),
    Target(
        name="checkpoint_pattern",
        make=text(*TYPED["pattern"]),
        read=list_checkpoints,
        is_file=False,
    ),
)
