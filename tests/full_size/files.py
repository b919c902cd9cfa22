"""Model files of full size with random weights, as their publishers name and shape the tensors."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from models_at_full_size import full_size

CHUNK = 1 << 24
"""Numbers that are written at once: a window of twice as many that are drawn once, because drawing
12 billion takes longer than all the rest."""


def write_model(name: str, path: Path, seed: int = 0) -> int:
    """The model in bfloat16 at `path`, never more than a chunk of it in memory; its numbers."""
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in full_size(name).model.diffusion_model.state_dict().items()
    }
    random, header, end = np.random.default_rng(seed), {}, 0
    pool = torch.from_numpy(random.standard_normal(2 * CHUNK, dtype=np.float32))
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # as safetensors pads it, so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for key, shape in shapes.items():
            for chunk in _drawn(random, pool, key, shape):
                file.write(memoryview(chunk.view(torch.uint16).numpy()))
    return end // 2


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
