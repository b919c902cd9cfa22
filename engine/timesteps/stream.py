"""TimestepStream: the timesteps of a run, item by item, the same whatever the batch size.

The uniform number of an item at its n-th visit is a pure function of (seed, n, item), so the
order of the items, the batch size and an interruption do not change what an item meets.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sampling import TimestepSampling

_INDEPENDENT, _CYCLE, _EPOCH = 1, 2, 3
"""Which use of the seed a generator serves."""
_LARGEST_BELOW_ONE = 1.0 - 2.0**-53


def epoch_pool(epoch: int, *, seed: int, item_count: int, buckets: int) -> np.ndarray:
    """u in [0, 1) of every item in one epoch, float64 (item_count,).

    With buckets >= 2 the bucket counts of an epoch differ by at most one, the values inside a
    bucket are jittered over equal parts of it, and an item meets every bucket once in each
    `buckets` epochs (a Latin square that is reshuffled after them).
    """
    rng = np.random.default_rng([_EPOCH if buckets >= 2 else _INDEPENDENT, epoch, seed])
    jitter = rng.random(item_count)
    if buckets < 2:
        return jitter
    cycle, turn = divmod(epoch, buckets)
    shuffle = np.random.default_rng([_CYCLE, cycle, seed])
    rank, order = shuffle.permutation(item_count), shuffle.permutation(buckets)
    slot = (rank + turn) % buckets
    count = np.bincount(slot, minlength=buckets)
    place = _place_within(slot, count, rng)
    u = (order[slot] + (place + jitter) / count[slot]) / buckets
    return np.minimum(u, _LARGEST_BELOW_ONE)


def _place_within(group: np.ndarray, count: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order inside each group: place 0 to count - 1 of every element."""
    shuffled = rng.permutation(len(group))
    grouped = shuffled[np.argsort(group[shuffled], kind="stable")]
    place = np.empty(len(group), dtype=np.int64)
    place[grouped] = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
    return place


class TimestepStream:
    """Draws the noise levels of a run's items; resumable, deterministic from the seed."""

    def __init__(self, sampling: TimestepSampling, item_count: int, seed: int) -> None:
        """item_count: items of the dataset; seed: 0 or more."""
        if item_count < 1:
            raise ValueError(f"item_count is {item_count}; a run needs at least one item")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        self.sampling = sampling
        self.seed = seed
        self._visits = np.zeros(item_count, dtype=np.int64)
        pool = functools.partial(
            epoch_pool,
            seed=seed,
            item_count=item_count,
            buckets=sampling.num_timestep_buckets,
        )
        self._pool = functools.lru_cache(maxsize=4)(pool)

    def uniforms(self, items: Sequence[int]) -> Tensor:
        """The next u of each item, float64 (len(items),); counts as one visit of each."""
        if len(set(items)) < len(items):
            return torch.cat([self.uniforms([item]) for item in items])
        index = np.asarray(items, dtype=np.int64)
        visits = self._visits[index]
        self._visits[index] += 1
        epochs = set(visits.tolist())
        if len(epochs) == 1:
            return torch.from_numpy(self._pool(epochs.pop())[index])
        u = np.empty(len(index))
        for epoch in epochs:
            now = visits == epoch
            u[now] = self._pool(epoch)[index[now]]
        return torch.from_numpy(u)

    def draw(self, items: Sequence[int], height: int, width: int) -> Tensor:
        """The next noise level t of each item, float64 (len(items),), for latents of
        height x width cells."""
        return self.sampling.distribution(height, width).from_uniform(self.uniforms(items))

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on: seed, buckets, and visits of each item."""
        return {
            "seed": self.seed,
            "num_timestep_buckets": self.sampling.num_timestep_buckets,
            "visits": torch.from_numpy(self._visits.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; ValueError when it is of another run."""
        visits = torch.as_tensor(state["visits"]).numpy()
        for name, saved, ours in (
            ("seed", state["seed"], self.seed),
            ("items", len(visits), len(self._visits)),
            (
                "num_timestep_buckets",
                state["num_timestep_buckets"],
                self.sampling.num_timestep_buckets,
            ),
        ):
            if saved != ours:
                raise ValueError(
                    f"the saved timesteps are of a run with {name} {saved}, this run has {ours}: "
                    "resume with the same setting, or start a new run"
                )
        self._visits[:] = visits
