"""Well-formed files of every kind that Braid reads, small: what the mutations begin with."""

import dataclasses
import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
from ema_files import write_run
from torch import Tensor
from training_runs import PLAN, make_run, train

from comfyui_braid.engine.ema.shadows import Shadows
from comfyui_braid.engine.fp8.model_file import comfy_quant
from comfyui_braid.engine.magcache.plan import Conditions, Curve, MagCachePlan
from comfyui_braid.engine.magcache.presets import presets
from comfyui_braid.engine.network.adapters import ADAPTERS
from comfyui_braid.engine.network.architectures import architecture_of
from comfyui_braid.engine.network.attach import Network, build_adapter
from comfyui_braid.engine.network.keys import encoded
from comfyui_braid.engine.network.layers import LayerShape
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns
from comfyui_braid.engine.network.weights import AdapterWeights
from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.engine.training.job import DataReference, ModelReference, TrainingJob
from comfyui_braid.engine.training.optimizers.optimizer import OptimizerSpec
from comfyui_braid.engine.training.options import (
    Checkpointing,
    Compilation,
    Preview,
    TrainingLog,
    Validation,
)
from comfyui_braid.engine.training.states.identity import Identity
from comfyui_braid.engine.training.states.saving import Saver
from comfyui_braid.engine.training.states.state import write_state

FLUX = architecture_of({"image_model": "flux"})
LAYERS = {
    "double_blocks.0.img_attn.qkv": LayerShape(in_features=8, out_features=24),
    "double_blocks.0.img_attn.proj": LayerShape(in_features=8, out_features=8),
    "single_blocks.0.linear1": LayerShape(in_features=8, out_features=56),
}
IDENTITY = {"seed": 7, "network": "NetworkSpec(rank=4)", "lr_warmup_steps": 2.0}
FP8 = torch.float8_e4m3fn
SHADOWED = {"a.lora_down.weight": (4, 8), "a.lora_up.weight": (10, 4)}
RUN = dataclasses.replace(PLAN, steps=6)
RUN_NETWORK = NetworkSpec(
    rank=4,
    alpha=4,
    neuron_dropout=0.1,
    targets=TargetPatterns(include=(r".*img_attn\.(qkv|proj)",), mode="whitelist"),
)
"""Two layers: what a state of many layers says over and over takes time to read."""


def adapter_state(kind: str, key_format: str) -> dict[str, Tensor]:
    """An adapter on every layer of LAYERS."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: AdapterWeights(
            kind=kind,
            tensors={
                key: torch.randn(shape, generator=generator)
                for key, shape in ADAPTERS[kind].parameter_shapes(layer, 2).items()
            },
            alpha=1.0,
        )
        for name, layer in LAYERS.items()
    }
    state = encoded(weights, key_format, FLUX)
    return {key: tensor.contiguous() for key, tensor in state.items()}


@functools.cache
def network() -> Network:
    """A LoRA on every layer of LAYERS, which the adapters are read into."""
    spec = NetworkSpec(rank=2)
    return Network({name: build_adapter(layer, spec) for name, layer in LAYERS.items()}, spec)


@functools.cache
def adapters() -> list[bytes]:
    """LoRA in every key format, LoHa, LoKr."""
    kinds = [("lora", "comfyui"), ("lora", "kohya"), ("lora", "diffusers")]
    kinds += [("loha", "comfyui"), ("lokr", "kohya")]
    metadata = {"ss_steps": "100", "ss_network_dim": "2", "ss_tag_frequency": '{"a": {"b": 1}}'}
    return [safetensors.torch.save(adapter_state(*kind), metadata) for kind in kinds]


@functools.cache
def checkpoints() -> list[bytes]:
    """Three of one run, the middle one first."""
    with TemporaryDirectory() as folder:
        files = [path.read_bytes() for path in write_run(Path(folder), 3)]
    return [files[1], files[0], files[2]]


@functools.cache
def shadows() -> list[bytes]:
    """EMA shadows as a run writes them."""
    generator = torch.Generator().manual_seed(0)
    live = {key: torch.randn(shape, generator=generator) for key, shape in SHADOWED.items()}
    kept = Shadows(live, sigma_rels=(0.05, 0.1, 0.25))
    kept.catch_up(100)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run-shadows.safetensors"
        kept.write(path, {"a.alpha": torch.tensor(4.0)}, {"ss_output_name": "run"})
        return [path.read_bytes()]


@functools.cache
def states() -> list[bytes]:
    """Training states: of a run after two steps, and of anything."""
    run, model = make_run(RUN, RUN_NETWORK)
    train(run, model, until=2)
    extra = {"shadows": Shadows({"a": torch.ones(2, 3)}).state_dict()}
    with TemporaryDirectory() as folder:
        saver = Saver(
            Path(folder),
            "run",
            Checkpointing(),
            lambda *_: None,
            Identity(named=IDENTITY),
            lambda: extra,
        )
        path = saver.save_state(run)
        other = Path(folder) / "other.state"
        write_state(other, {"identity": IDENTITY, "run": {"step": 1}, "list": [(1, {"a": None})]})
        return [path.read_bytes()] * 3 + [other.read_bytes()]


@functools.cache
def models() -> list[bytes]:
    """bf16, musubi's FP8, ComfyUI's FP8 with markers, with a header, of a whole model."""
    generator = torch.Generator().manual_seed(0)
    plain = {
        "blocks.0.q.weight": torch.randn(8, 16, generator=generator).bfloat16(),
        "blocks.0.q.bias": torch.randn(8, generator=generator).bfloat16(),
        "blocks.1.q.weight": torch.randn(8, 16, generator=generator),
        "norm.weight": torch.randn(8, generator=generator),
    }
    codes = plain | {"blocks.0.q.weight": plain["blocks.0.q.weight"].to(FP8)}
    musubi = codes | {"blocks.0.q.scale_weight": torch.rand(8, 2, 1)}
    marked = codes | {"blocks.0.q.weight_scale": torch.tensor(0.5)}
    marked |= {
        "blocks.0.q.comfy_quant": comfy_quant("float8_e4m3fn", full_precision_matrix_mult=True)
    }
    older = codes | {
        "blocks.0.q.scale_weight": torch.tensor(0.5),
        "scaled_fp8": torch.zeros(2, dtype=FP8),
    }
    older |= {"blocks.0.q.scale_input": torch.tensor(1.5)}
    layers = {"model.diffusion_model.blocks.0.q": {"format": "float8_e4m3fn"}}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    whole = {f"model.diffusion_model.{key}": tensor for key, tensor in marked.items()}
    kinds = [(plain, {}), (musubi, {}), (marked, {"a": "b"}), (older, {}), (whole, header)]
    return [safetensors.torch.save(tensors, metadata) for tensors, metadata in kinds]


@functools.cache
def calibrations() -> list[bytes]:
    """One that was measured, and a published list."""
    steps = 6
    sigmas = tuple(1.0 - i / steps for i in range(steps + 1))
    ratios = (1.0, 0.98, 0.97, 0.99, 0.96, 0.9)
    measured = MagCachePlan(
        name="flux",
        conditions=Conditions(
            steps=steps, sigmas=sigmas, model="Flux", resolution=(64, 64), cfg=1.0
        ),
        curves=(Curve(label="positive", ratios=ratios, spread=(0.1,) * steps),),
        inner_products=tuple(tuple(1.0 / (1 + i - j) for j in range(i + 1)) for i in range(steps)),
    )
    published = next(iter(presets().values())).plan
    return [plan.to_json().encode() for plan in (measured, measured, published)]


@functools.cache
def job() -> str:
    """A training job with every part."""
    return TrainingJob(
        plan=dataclasses.replace(RUN, output_name="a/b"),
        network=dataclasses.replace(RUN_NETWORK, loraplus_lr_ratio=4),
        timesteps=TimestepSampling(mode="shift", discrete_flow_shift=2.5),
        optimizer=OptimizerSpec(
            optimizer_args={"betas": (0.9, 0.98), "weight_decay": 0.02},
            lr_scheduler="cosine",
            lr_warmup_steps=0.5,
            lr_scheduler_args={"num_cycles": 1},
        ),
        model=ModelReference(file="flux.safetensors", architecture="FLUX"),
        data=DataReference(items=3, fingerprint="0123456789abcdef"),
        held_out=DataReference(items=1, fingerprint="fedcba9876543210"),
        checkpointing=Checkpointing(save_every_n_steps=2, resume="latest"),
        log=TrainingLog(log_with="tensorboard", logging_dir=Path("output") / "logs"),
        compilation=Compilation(dynamo_dynamic=None),
        preview=Preview(every_n_steps=5),
        validation=Validation(every_n_steps=2, timesteps_per_item=3, seed=1),
    ).to_json()
