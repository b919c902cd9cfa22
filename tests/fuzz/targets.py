"""What is read, and what reads it: every file and typed text that needs no ComfyUI."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from training_runs import make_run

from comfyui_braid.engine.checkpoints import find_checkpoints
from comfyui_braid.engine.disk.reading import damage_named
from comfyui_braid.engine.ema.average import averaged, plan_average
from comfyui_braid.engine.ema.reconstruction import plan_reconstruction, reconstructed
from comfyui_braid.engine.ema.schedule import Power
from comfyui_braid.engine.ema.shadows import Shadows
from comfyui_braid.engine.files import read_header, read_tensors
from comfyui_braid.engine.fp8.model_file import recognise, without_prefix
from comfyui_braid.engine.fp8.policy import Decision, Fp8Policy, LayerPatterns
from comfyui_braid.engine.fp8.source import map_tensors
from comfyui_braid.engine.fp8.stream import quantized_stream
from comfyui_braid.engine.magcache.plan import (
    Conditions,
    MagCachePlan,
    mismatches,
    plan_from_ratios,
    ratios_text,
    read_plan,
)
from comfyui_braid.engine.magcache.rules import MagCacheRule, PlannedRule
from comfyui_braid.engine.magcache.schedule import plan_schedule
from comfyui_braid.engine.network.adapter_file import load_weights, read_adapter
from comfyui_braid.engine.network.keys import KEY_FORMATS, encoded
from comfyui_braid.engine.network.metadata import parse_metadata
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns, parse_network_args
from comfyui_braid.engine.network.targets import select_targets
from comfyui_braid.engine.patterns import parse_patterns
from comfyui_braid.engine.playground.model import Flux, FluxShape
from comfyui_braid.engine.training.optimizers.optimizer import Optimization, OptimizerSpec
from comfyui_braid.engine.training.plan import TrainingPlan
from comfyui_braid.engine.training.states.identity import Identity
from comfyui_braid.engine.training.states.resume import resumed
from comfyui_braid.engine.training.states.saving import find_state, run_folder

from . import files
from .containers import mutated_container, with_checksum
from .mutate import mutated_bytes, mutated_json, mutated_text

Input = bytes | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One reader with what it is given."""

    name: str
    make: Callable[[Random], Input]
    """An input: a well-formed one that was changed at random."""
    read: Callable[[Any, Path], object]
    """Reads an input, in a folder that is empty at first; may raise only what a user is told."""
    is_file: bool
    """Whether a refusal must say the name `damaged`, which the file goes by."""
    long: int = 6000
    """Inputs of the long run."""


def container(corpus: Callable[[], Sequence[bytes]], finish=None) -> Callable[[Random], bytes]:
    return lambda rng: mutated_container(rng, corpus(), finish)


def text(*texts: str) -> Callable[[Random], str]:
    return lambda rng: mutated_text(rng, texts)


def written(data: bytes, folder: Path, name: str = "damaged.safetensors") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def read_any(data: bytes, folder: Path) -> None:
    path = written(data, folder)
    header = read_header(path)
    assert read_tensors(path).keys() == header.tensors.keys()


def read_any_adapter(data: bytes, folder: Path) -> None:
    path = written(data, folder)
    weights = read_adapter(path, files.LAYERS, files.FLUX)
    with damage_named(path):
        load_weights(files.network(), weights)
        for key_format in KEY_FORMATS:
            encoded(weights, key_format, files.FLUX)


def average_run(data: bytes, folder: Path) -> None:
    _, first, last = files.checkpoints()
    written(first, folder, "run-step00000100.safetensors")
    written(last, folder, "run-step00000300.safetensors")
    written(data, folder)
    plan = plan_average(find_checkpoints(folder), Power(sigma_rel=0.2))
    exhaust(averaged(plan, "factors", folder / "merged.safetensors"))
    with damage_named(folder / "damaged.safetensors"):
        exhaust(averaged(plan, "product"))


def exhaust(steps) -> None:
    for _ in steps:
        pass


def rebuild_from_shadows(data: bytes, folder: Path) -> None:
    written(files.checkpoints()[0], folder, "damaged-step00000100.safetensors")
    written(data, folder, "damaged-shadows.safetensors")
    run = find_checkpoints(folder)
    plan = plan_reconstruction(run, 0.15)
    exhaust(reconstructed(run, plan, folder / "rebuilt.safetensors"))


@functools.cache
def run_to_resume():
    return make_run(files.RUN)


def resume(data: bytes, folder: Path) -> None:
    path = written(data, folder, "damaged-step00000002.state")
    run, _ = run_to_resume()
    groups = [
        {"params": group["params"], "lr": 1e-3, "name": name}
        for group, name in zip(
            run.optimization.optimizer.param_groups, run.optimization.group_names, strict=True
        )
    ]
    spec = OptimizerSpec(lr_scheduler="cosine", lr_warmup_steps=2)
    run.optimization = Optimization(spec, groups, files.RUN.steps)
    rest = resumed(run, path, Identity(named=files.IDENTITY))
    with damage_named(path):
        Shadows({"a": torch.ones(2, 3)}).load_state_dict(rest.get("shadows"))


def quantise(data: bytes, folder: Path) -> None:
    path = written(data, folder)
    whole = map_tensors(path)
    with damage_named(path):
        source = without_prefix(whole, "model.diffusion_model.")
        if recognise(source.tensors, source.metadata) is None:
            decisions = {
                key: Decision(quantize=True, reason="")
                for key, tensor in source.tensors.items()
                if key.endswith(".weight") and tensor.ndim == 2
            }
            exhaust(quantized_stream(source.tensors, decisions, Fp8Policy(), torch.device("cpu")))


SIGMAS = tuple(1 - i / 12 for i in range(13))


def use_plan(plan: MagCachePlan) -> None:
    for rule in (MagCacheRule(), MagCacheRule(interpolation="nearest"), PlannedRule(speedup=1.5)):
        if plan.calibrated or isinstance(rule, MagCacheRule):
            plan_schedule(plan, SIGMAS, rule)
    mismatches(plan.conditions, Conditions(steps=12, sigmas=SIGMAS, model="Flux", cfg=2.0))
    assert MagCachePlan.from_json(plan.to_json()) == plan
    ratios_text(plan)


def mutated_calibration(rng: Random) -> bytes:
    data = rng.choice(files.calibrations())
    if rng.random() < 0.3:
        return mutated_bytes(rng, data, rng.choice(files.calibrations()))
    return mutated_json(rng, json.loads(data)).encode("utf-8", "surrogatepass")


@functools.cache
def small_flux() -> Flux:
    return Flux(FluxShape(depth=1, depth_single_blocks=1))


def select(patterns: str, folder: Path) -> None:
    exclude = parse_patterns("exclude_patterns", patterns)
    spec = NetworkSpec(targets=TargetPatterns(exclude=exclude, include=exclude))
    select_targets(small_flux(), spec, files.FLUX)
    policy = Fp8Policy(patterns=LayerPatterns(include=exclude, exclude=exclude))
    for name, _ in small_flux().named_modules():
        policy.decide(name, "flux")


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


FILES = (
    Target(
        name="headers",
        make=container(lambda: [*files.adapters(), *files.models(), *files.shadows()]),
        read=read_any,
        is_file=True,
    ),
    Target(name="adapters", make=container(files.adapters), read=read_any_adapter, is_file=True),
    Target(name="checkpoints", make=container(files.checkpoints), read=average_run, is_file=True),
    Target(name="shadows", make=container(files.shadows), read=rebuild_from_shadows, is_file=True),
    Target(name="states", make=container(files.states, with_checksum), read=resume, is_file=True),
    Target(name="models", make=container(files.models), read=quantise, is_file=True),
    Target(
        name="calibrations",
        make=mutated_calibration,
        read=lambda data, folder: use_plan(read_plan(written(data, folder, "damaged.json"))),
        is_file=True,
    ),
)
TEXTS = (
    Target(
        name="network_args",
        make=text(
            "conv_dim=4 conv_alpha=1\nfactor=8",
            "exclude_patterns=[r'.*single.*', r'.*mod.*'] verbose=True",
            '--network_args loraplus_lr_ratio=4 "rank_dropout=0.1"',
        ),
        read=lambda typed, folder: parse_network_args(typed),
        is_file=False,
    ),
    Target(
        name="patterns",
        make=text(
            r".*single_blocks.*", r"double_blocks\.(0|1)\..*qkv" + "\n.*proj", "[r'.*img.*']"
        ),
        read=select,
        is_file=False,
    ),
    Target(
        name="mag_ratios",
        make=text("1.0,1.02,0.98,0.9", "1,1,1\n1,0.9,0.8", "0"),
        read=lambda typed, folder: use_plan(plan_from_ratios(typed)),
        is_file=False,
    ),
    Target(
        name="metadata",
        make=lambda rng: (
            mutated_json(rng, {"modelspec.author": "me", "a": {"b": [1, 2.5, None]}})
            if rng.random() < 0.6
            else mutated_text(rng, ['{"modelspec.author": "me"}'])
        ),
        read=lambda typed, folder: parse_metadata(typed),
        is_file=False,
    ),
    Target(
        name="output_name",
        make=text("my_lora", "folder/my_lora", "a b.c"),
        read=name_output,
        is_file=False,
    ),
    Target(
        name="resume",
        make=text("latest", "lora/lora-step00000002.state", "/tmp/x.state"),
        read=lambda typed, folder: find_state(folder, "lora", typed),
        is_file=False,
    ),
    Target(
        name="checkpoint_pattern",
        make=text("*.safetensors", "run-step*.safetensors", "**/*-step[0-9]*.safetensors"),
        read=list_checkpoints,
        is_file=False,
    ),
)
