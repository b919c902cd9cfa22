"""Whether files are snapshots of one run, which averaging their factors takes for granted.

A product up·down stays the same when its rank dimensions are rotated, and each run starts from its
own random rotation. Averaging factors across runs therefore averages unrelated numbers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .layout import Source, is_averaged

SAMPLED_TENSORS = 32
SAMPLED_ELEMENTS = 8192  # of each sampled tensor: at most 1 MB a file
MIN_ELEMENTS = 1024
"""With fewer, chance alone gives cosines of 1/sqrt(n) > 0.03 and nothing can be told."""
MIN_COSINE = 0.25
"""Measured on FLUX layers (rank 1 to 8, learning rate 1e-4 to 3e-2): neighbours of one run 0.86 and
more, its first and last file 0.51 and more; files of different runs 0.12 and less. Chance between
runs goes as 1 / (rank * sqrt(layers)), so only a LoRA of a few layers can pass unseen."""


def consecutive_cosines(sources: Sequence[Source]) -> list[float]:
    """Cosine between the sampled factors of each file and the next, (N - 1,)."""
    samples = [_sampled_factors(source, sources) for source in sources]
    return [
        float(torch.nn.functional.cosine_similarity(one, other, dim=0))
        for one, other in zip(samples, samples[1:], strict=False)
    ]


def check_one_run(sources: Sequence[Source]) -> list[float]:
    """`consecutive_cosines`; ValueError naming both files where two are visibly not of one run."""
    cosines = consecutive_cosines(sources)
    enough = _sampled_factors(sources[0], sources).numel() >= MIN_ELEMENTS
    for cosine, one, other in zip(cosines, sources, sources[1:], strict=False):
        if enough and cosine < MIN_COSINE:
            raise ValueError(
                f"{one.path.name} and {other.path.name} look like different runs (the cosine "
                f"between their factors is {cosine:.3f}, below {MIN_COSINE}): averaging their "
                "factors would give noise; leave one out, or use space 'product'"
            )
    return cosines


def _sampled_factors(source: Source, sources: Sequence[Source]) -> Tensor:
    """The beginnings of evenly spaced tensors, each at unit norm so that none dominates."""
    keys = sorted(key for key in source.header.tensors if is_averaged(key, sources))
    indices = np.unique(np.linspace(0, len(keys) - 1, SAMPLED_TENSORS).round().astype(int))
    parts = [source.read_some(keys[i], SAMPLED_ELEMENTS).float() for i in indices]
    return torch.cat([torch.nn.functional.normalize(part, dim=0) for part in parts])
