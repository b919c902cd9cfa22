"""Independent random streams, each a pure function of the run's seed, a purpose and a position.

Nothing of them needs to be saved: a resumed run draws what the uninterrupted one would have drawn.
"""

import zlib

import numpy as np
import torch


def derived_seed(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed for `purpose` at `position` (step, epoch, …)."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *position])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def numpy_generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    return np.random.default_rng(derived_seed(seed, purpose, *position))


def torch_generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """On the CPU, so that a run draws the same numbers on every device."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *position))
