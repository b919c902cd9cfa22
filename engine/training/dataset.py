"""The items of a run and the order in which it meets them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .seeds import numpy_generator


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingItem:
    """One cached latent with its conditioning."""

    latents: Tensor
    """(C, H, W) or (C, T, H, W), in the scale the denoiser trains on."""
    conditioning: Any
    """Whatever the denoiser's `raw_output` takes for one item."""
    batch_key: Hashable
    """Items may share a batch when these are equal: the shape of the latents."""


class Dataset:
    """Items in a fixed numbering; every epoch meets each of them once.

    The order is a pure function of (seed, epoch): it is the same after a resume, and the number of
    batches of an epoch never changes.
    """

    def __init__(self, items: Sequence[TrainingItem]) -> None:
        if not items:
            raise ValueError("the dataset is empty; connect at least one latent to train on")
        self.items = tuple(items)
        groups: dict[Hashable, list[int]] = {}
        for index, item in enumerate(self.items):
            groups.setdefault(item.batch_key, []).append(index)
        self._groups = tuple(np.asarray(group) for group in groups.values())

    def __len__(self) -> int:
        return len(self.items)

    def batches_per_epoch(self, batch_size: int) -> int:
        return sum(-(-len(group) // batch_size) for group in self._groups)

    def batches(self, *, seed: int, epoch: int, batch_size: int) -> list[list[int]]:
        """Item numbers of every batch of one epoch: groups shuffled inside, then all batches."""
        generator = numpy_generator(seed, "data order", epoch)
        batches = []
        for group in self._groups:
            shuffled = generator.permutation(group)
            batches += [
                shuffled[start : start + batch_size].tolist()
                for start in range(0, len(shuffled), batch_size)
            ]
        return [batches[i] for i in generator.permutation(len(batches))]
