"""What reads a file of a stranger and uses what it read, without ComfyUI."""

import functools
import struct
from pathlib import Path
from random import Random

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
from comfyui_braid.engine.fp8.policy import Decision, Fp8Policy
from comfyui_braid.engine.fp8.source import TensorSource, map_tensors
from comfyui_braid.engine.fp8.stream import quantized_stream
from comfyui_braid.engine.magcache.plan import Conditions, MagCachePlan, mismatches, ratios_text
from comfyui_braid.engine.magcache.rules import MagCacheRule, PlannedRule
from comfyui_braid.engine.magcache.schedule import plan_schedule
from comfyui_braid.engine.network.adapter_file import load_weights, read_adapter
from comfyui_braid.engine.network.attach import attached
from comfyui_braid.engine.network.keys import KEY_FORMATS, encoded
from comfyui_braid.engine.training.job import TrainingJob
from comfyui_braid.engine.training.loop import TrainingDiverged
from comfyui_braid.engine.training.optimizers.optimizer import Optimization, OptimizerSpec
from comfyui_braid.engine.training.states.identity import Identity
from comfyui_braid.engine.training.states.resume import resumed

from . import files
from .containers import mutated_container
from .target import written


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
    """A run, its model, and what is told of a state that it goes on from."""
    return make_run(files.RUN, files.RUN_NETWORK)


def resume(data: bytes, folder: Path) -> None:
    """The run of `files.states()` goes on from it, and takes one step where there is one left."""
    path = written(data, folder, "damaged-step00000002.state")
    run, model = run_to_resume()
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
        with attached(model, run.network):
            try:
                next(run.steps(), None)
            except TrainingDiverged as told:  # weights that are numbers, but not for long
                raise ValueError(str(told)) from told


def quantise(data: bytes, folder: Path) -> None:
    path = written(data, folder)
    whole = map_tensors(path)
    with damage_named(path):
        quantise_all(whole)


def quantise_all(whole: TensorSource) -> None:
    source = without_prefix(whole, "model.diffusion_model.")
    if recognise(source.tensors, source.metadata) is None:
        decisions = {
            key: Decision(quantize=True, reason="")
            for key, tensor in source.tensors.items()
            if key.endswith(".weight") and tensor.ndim == 2
        }
        exhaust(quantized_stream(source.tensors, decisions, Fp8Policy(), torch.device("cpu")))


def mutated_shards(rng: Random) -> bytes:
    """Two files, the length of the first before them; one of them is damaged."""
    pair = [rng.choice(files.models()), rng.choice(files.models())]
    pair[rng.randrange(2)] = mutated_container(rng, files.models())
    return struct.pack("<Q", len(pair[0])) + pair[0] + pair[1]


def quantise_shards(data: bytes, folder: Path) -> None:
    (length,) = struct.unpack("<Q", data[:8])
    first = written(data[8 : 8 + length], folder, "damaged-00001-of-00002.safetensors")
    written(data[8 + length :], folder, "damaged-00002-of-00002.safetensors")
    whole = map_tensors(first)
    with damage_named(first):
        quantise_all(whole)


SIGMAS = tuple(1 - i / 12 for i in range(13))


def use_plan(plan: MagCachePlan) -> None:
    for rule in (MagCacheRule(), MagCacheRule(interpolation="nearest"), PlannedRule(speedup=1.5)):
        if plan.calibrated or isinstance(rule, MagCacheRule):
            plan_schedule(plan, SIGMAS, rule)
    mismatches(plan.conditions, Conditions(steps=12, sigmas=SIGMAS, model="Flux", cfg=2.0))
    assert MagCachePlan.from_json(plan.to_json()) == plan
    ratios_text(plan)


def read_job(document: str, folder: Path) -> None:
    """The job, and the parts of it that an engine builds from their values alone."""
    job = TrainingJob.from_json(document)
    assert TrainingJob.from_json(job.to_json()) == job
    job.timesteps.distribution(64, 64).from_uniform(torch.linspace(0.0, 0.999, 5))
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    groups = [{"params": [parameter], "lr": job.plan.learning_rate, "name": "unet"}]
    Optimization(job.optimizer, groups, min(job.plan.steps, 100))
