"""Small adapter files for the tests of the EMA engine."""

from pathlib import Path

import safetensors.torch
import torch

from comfyui_braid.engine.checkpoints import Checkpoint, Checkpoints
from comfyui_braid.engine.ema.average import averaged, plan_average
from comfyui_braid.engine.ema.schedule import BetaRamp

DOWN, UP, ALPHA = "lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha"
HALF = BetaRamp(beta=0.5, beta2=0.5)


def adapter(seed: int = 0, rank: int = 4, modules: int = 2, width: int = 8, dtype=torch.float32):
    """Tensors of a tiny LoRA in kohya's keys."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index in range(modules):
        name = f"lora_unet_{chr(ord('a') + index)}"
        down = torch.randn(rank, width, generator=generator)
        up = torch.randn(width + 2, rank, generator=generator)
        tensors |= {
            f"{name}.lora_down.weight": down.to(dtype),
            f"{name}.lora_up.weight": up.to(dtype),
            f"{name}.alpha": torch.tensor(float(rank)).to(dtype),
        }
    return tensors


def save(path: Path, tensors, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path, metadata or None)
    return path


def save_pair(folder: Path, one, other) -> list[Path]:
    """Two files: one.safetensors and other.safetensors."""
    return [save(folder / "one.safetensors", one), save(folder / "other.safetensors", other)]


def write_run(folder: Path, count: int = 4, drift: float = 0.2, every: int = 100, **shape):
    """`count` checkpoints that drift away from each other, with their steps in the metadata."""
    tensors = adapter(**shape)
    paths = []
    for index in range(count):
        moved = adapter(seed=1000 + index, **{k: v for k, v in shape.items() if k != "seed"})
        step = (index + 1) * every
        now = {
            key: value if key.endswith("alpha") else value + drift * index * moved[key]
            for key, value in tensors.items()
        }
        path = folder / f"run-step{step:08d}.safetensors"
        paths.append(save(path, now, ss_steps=str(step), ss_output_name="run"))
    return paths


def checkpoints(paths, steps=None) -> Checkpoints:
    steps = steps or [None] * len(paths)
    return Checkpoints(
        files=tuple(Checkpoint(path=p, step=s) for p, s in zip(paths, steps, strict=True))
    )


def finish(steps):
    """Run a generator to its end; returns its result and everything it yielded."""
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return end.value, seen


def average_of(run: Checkpoints, schedule, output: Path | None = None, space="factors", **select):
    """The Average of a run, in one call."""
    return finish(averaged(plan_average(run, schedule, **select), space, output))[0]
