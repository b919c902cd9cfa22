"""Model files of full size with random weights, as their publishers name and shape the tensors."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from comfyui_braid.engine.disk.writing import replaced_when_whole
from comfyui_braid.engine.files import header_bytes, saved_layout

from .models import diffusion_model

CHUNK = 1 << 24
"""Numbers that are written at once: a window of twice as many that are drawn once, because drawing
12 billion takes longer than all the rest."""


def write_model(name: str, path: Path, seed: int = 0) -> int:
    """The model in bfloat16 at `path`, never more than a chunk of it in memory; its numbers."""
    state = diffusion_model(name).state_dict()
    layout = saved_layout({key: ("BF16", tuple(tensor.shape)) for key, tensor in state.items()})
    random = np.random.default_rng(seed)
    pool = torch.from_numpy(random.standard_normal(2 * CHUNK, dtype=np.float32))
    with replaced_when_whole(path) as file:
        file.write(header_bytes(layout, {}))
        for key, entry in layout.items():
            for chunk in _drawn(random, pool, key, entry.shape):
                file.write(chunk.view(torch.uint8).numpy().data)
    return sum(math.prod(entry.shape) for entry in layout.values())


def _drawn(
    random: np.random.Generator, pool: torch.Tensor, key: str, shape: tuple[int, ...]
) -> Iterator[torch.Tensor]:
    """Numbers of a trained model's size: a layer hands on what it gets, a norm changes little."""
    fan_in = math.prod(shape[1:])
    scale, mean = (1 / math.sqrt(fan_in), 0.0) if len(shape) > 1 else (0.02, _mean(key))
    for start in range(0, math.prod(shape), CHUNK):
        count = min(CHUNK, math.prod(shape) - start)
        window = pool[int(random.integers(CHUNK)) :][:count]
        yield (window * scale + mean).to(torch.bfloat16)


def _mean(key: str) -> float:
    return 1.0 if "norm" in key and key.endswith(("weight", "scale")) else 0.0
