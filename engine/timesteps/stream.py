"""TimestepStream: the timesteps of a run, item by item, the same whatever the batch size.

The uniform number of an item at its n-th visit is a pure function of (seed, n, item), so the
order of the items, the batch size and an interruption do not change what an item meets.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .distributions import LARGEST_BELOW_ONE
from .sampling import TimestepSampling

_JITTER, _LATTICE = 1, 2
"""Which use of the seed a generator serves."""
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
MOST_AHEAD = 1_000_000
"""Visits that an item may have more than another; in a run they come epoch by epoch."""


def epoch_pool(epoch: int, *, seed: int, item_count: int, buckets: int) -> np.ndarray:
    """u in [0, 1) of every item in one epoch, float64 (item_count,); each is uniform by itself.

    With buckets >= 2 the items' places x form a lattice with two properties, for any two counts:
    in one epoch the places lie 1 / item_count apart, so the bucket counts differ by at most one;
    over `buckets` epochs an item's own places lie 1 / buckets apart, so it meets every bucket
    once. The shuffle and the shift of the lattice are new after that many epochs. u is then
    uniform in the part of the bucket that is also in the item's own 1 / item_count of [0, 1).
    """
    jitter = np.random.default_rng([_JITTER, epoch, seed]).random(item_count)
    if buckets < 2:
        return jitter
    cycle, turn = divmod(epoch, buckets)
    shuffle = np.random.default_rng([_LATTICE, cycle, seed])
    rank, shift = shuffle.permutation(item_count), shuffle.random()
    step = _golden_step(buckets) * turn % buckets
    x = (rank / item_count + step / buckets + shift) % 1.0
    stratum, bucket = np.floor(x * item_count), np.floor(x * buckets)
    low = np.maximum(stratum / item_count, bucket / buckets)
    high = np.minimum((stratum + 1) / item_count, (bucket + 1) / buckets)
    return np.minimum(low + jitter * (high - low), LARGEST_BELOW_ONE)


def _golden_step(buckets: int) -> int:
    """A step that visits all buckets, neighbours in time far apart (about the golden ratio), so
    that a run of fewer epochs than buckets still spreads each item's draws."""
    step = max(1, round(buckets * _GOLDEN))
    while math.gcd(step, buckets) > 1:
        step += 1
    return step


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

    def uniforms(self, items: Sequence[int] | np.ndarray) -> Tensor:
        """The next u of each item, float64 (len(items),); counts as one visit of each."""
        index = np.asarray(items, dtype=np.int64)
        if _has_duplicates(index):
            return torch.cat([self.uniforms(index[i : i + 1]) for i in range(len(index))])
        visits = self._visits[index]
        self._visits[index] += 1
        u = np.empty(len(index))
        for epoch in _values_in(visits):
            now = visits == epoch
            u[now] = self._pool(epoch)[index[now]]
        return torch.from_numpy(u)

    def draw(self, items: Sequence[int] | np.ndarray, height: int, width: int) -> Tensor:
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
        visits = state.get("visits")
        if not isinstance(visits, Tensor) or visits.ndim != 1 or visits.dtype != torch.int64:
            raise ValueError("the saved timesteps hold no visits of the items")
        fewest, most = (int(end) for end in visits.aminmax()) if len(visits) else (0, 0)
        if fewest < 0 or most > min(fewest + MOST_AHEAD, 2**53):
            raise ValueError(f"the saved timesteps hold from {fewest} to {most} visits of an item")
        for name, saved, ours in (
            ("seed", state.get("seed"), self.seed),
            ("items", len(visits), len(self._visits)),
            (
                "num_timestep_buckets",
                state.get("num_timestep_buckets"),
                self.sampling.num_timestep_buckets,
            ),
        ):
            if type(saved) is not int or saved != ours:
                raise ValueError(
                    f"the saved timesteps are of a run with {name} {saved}, this run has {ours}: "
                    "resume with the same setting, or start a new run"
                )
        self._visits[:] = visits.numpy()


def _has_duplicates(values: np.ndarray) -> bool:
    ordered = np.sort(values)
    return bool((ordered[1:] == ordered[:-1]).any())


def _values_in(visits: np.ndarray) -> list[int]:
    """The different values, rising; they lie close together."""
    lowest = visits.min()
    return (lowest + np.flatnonzero(np.bincount(visits - lowest))).tolist()
