"""What a run draws: the same whatever the batch size, resumable, evenly spread with buckets."""

import math

import numpy as np
import pytest
import torch

from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.engine.timesteps.stream import TimestepStream, epoch_pool

CELLS = (128, 128)
PAPER = dict(logit_mean=-6.0, logit_std=2.0)


def epochs(sampling: TimestepSampling, items: int, count: int, seed: int = 0) -> torch.Tensor:
    """(count, items) draws of a run."""
    stream = TimestepStream(sampling, items, seed)
    return torch.stack([stream.draw(range(items), *CELLS) for _ in range(count)])


def variance_ratio(settings: dict, items: int, loss) -> float:
    """Variance of an epoch's mean loss over that of independent draws."""
    sampling = TimestepSampling(**settings)
    means = loss(epochs(sampling, items, 300)).mean(dim=1)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    single = loss(sampling.distribution(*CELLS).from_uniform(u)).var(correction=0)
    return (means.var() / (single / items)).item()


def smooth_loss(t: torch.Tensor) -> torch.Tensor:
    return 0.3 + (1.0 - t) ** 2 + 0.2 * torch.sin(3.0 * t)


@pytest.mark.parametrize("buckets", [4, 10, 128])
@pytest.mark.parametrize(
    "settings",
    [
        dict(mode="uniform"),
        dict(mode="sigmoid"),
        dict(mode="shift", discrete_flow_shift=3.0),
        dict(mode="flux_shift"),
        dict(mode="logsnr"),
        dict(weighting_scheme="mode"),
        dict(mode="shift", min_timestep=300, preserve_distribution_shape=True),
    ],
    ids=str,
)
def test_buckets_cut_the_variance_of_an_epochs_mean_loss_a_hundredfold(settings, buckets):
    ratio = variance_ratio(settings | dict(num_timestep_buckets=buckets), 128, smooth_loss)
    assert ratio <= 0.01


@pytest.mark.parametrize(
    "limits", [{}, dict(min_timestep=100, preserve_distribution_shape=True)], ids=["whole", "cut"]
)
@pytest.mark.parametrize("mode", ["qinglong_flux", "qinglong_qwen"])
def test_buckets_survive_the_mixture(mode, limits):
    settings = dict(mode=mode, num_timestep_buckets=10, **PAPER, **limits)
    assert variance_ratio(settings, 128, smooth_loss) <= 0.05


def test_the_paper_setting_of_logsnr_is_spread_as_far_as_its_tail_allows():
    """One of 128 strata holds t from 0 to 0.64: that stratum alone is most of what is left."""
    settings = dict(mode="logsnr", num_timestep_buckets=10, **PAPER)
    assert variance_ratio(settings, 128, smooth_loss) <= 0.025


def test_without_buckets_draws_are_independent():
    assert 0.75 < variance_ratio(dict(mode="flux_shift"), 128, smooth_loss) < 1.25


@pytest.mark.parametrize(
    ("items", "buckets"), [(18, 5), (3, 10), (1, 10), (128, 10), (7, 4), (9, 9)]
)
def test_bucket_counts_of_an_epoch_differ_by_at_most_one(items, buckets):
    for epoch in range(3 * buckets):
        u = epoch_pool(epoch, seed=7, item_count=items, buckets=buckets)
        counts = np.bincount((u * buckets).astype(int), minlength=buckets)
        assert counts.sum() == items and counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("items", "buckets"), [(18, 5), (3, 10), (1, 10), (128, 10), (7, 4), (9, 9)]
)
def test_an_item_meets_every_bucket_once_in_as_many_epochs(items, buckets):
    cycle = np.stack(
        [epoch_pool(buckets + e, seed=3, item_count=items, buckets=buckets) for e in range(buckets)]
    )
    met = np.sort((cycle * buckets).astype(int), axis=0)
    assert (met == np.arange(buckets)[:, None]).all()


def test_items_are_reshuffled_after_each_cycle():
    first, later = (
        np.argsort(epoch_pool(epoch, seed=0, item_count=50, buckets=4)) for epoch in (0, 4)
    )
    assert (first == later).mean() < 0.2


@pytest.mark.parametrize("buckets", [0, 7])
def test_each_items_u_is_uniform_by_itself(buckets):
    u = np.stack([epoch_pool(e, seed=1, item_count=5, buckets=buckets) for e in range(7 * 600)])
    for item in range(5):
        step = (np.arange(len(u)) + 0.5) / len(u)
        assert np.abs(np.sort(u[:, item]) - step).max() < 1.63 / math.sqrt(len(u))


def test_buckets_with_a_cut_range_count_equally_between_its_own_quantiles():
    sampling = TimestepSampling(
        mode="sigmoid", min_timestep=600, preserve_distribution_shape=True, num_timestep_buckets=5
    )
    t = epochs(sampling, 20, 6)
    quantile = sampling.distribution(*CELLS).cdf(t)
    for epoch in quantile:
        assert torch.bincount((epoch * 5).long(), minlength=5).tolist() == [4] * 5
    assert t.min() >= 0.6


def test_mixture_shares_hold_in_every_epoch():
    sampling = TimestepSampling(
        mode="qinglong_flux", num_timestep_buckets=8, logit_mean=-30.0, logit_std=0.1
    )
    for epoch in epochs(sampling, 200, 20):
        style = (epoch > 0.999999).sum().item()  # log-SNR -30 is pure noise
        assert abs(style - 0.075 * 200) <= 1


@pytest.mark.parametrize(
    "settings", [dict(mode="flux_shift"), dict(num_timestep_buckets=6)], ids=str
)
def test_the_batch_size_does_not_change_what_an_item_meets(settings):
    sampling, order = TimestepSampling(**settings), list(range(24))
    one_by_one, batched = TimestepStream(sampling, 24, 5), TimestepStream(sampling, 24, 5)
    for _ in range(3):
        single = torch.cat([one_by_one.draw([item], *CELLS) for item in reversed(order)]).flip(0)
        batch = torch.cat([batched.draw(order[i : i + 5], *CELLS) for i in range(0, 24, 5)])
        assert torch.equal(single, batch)


def test_an_item_twice_in_a_batch_meets_two_timesteps():
    stream, again = (TimestepStream(TimestepSampling(), 2, 0) for _ in range(2))
    twice = stream.draw([1, 0, 1], *CELLS)
    assert torch.equal(twice, torch.cat([again.draw([i], *CELLS) for i in (1, 0, 1)]))
    assert twice[0] != twice[2]


def test_uniforms_are_what_draw_maps():
    sampling = TimestepSampling(mode="flux_shift")
    u = TimestepStream(sampling, 8, 2).uniforms(range(8))
    t = TimestepStream(sampling, 8, 2).draw(range(8), *CELLS)
    assert torch.equal(sampling.distribution(*CELLS).from_uniform(u), t)


@pytest.mark.parametrize("buckets", [0, 4])
def test_a_resumed_run_goes_on_with_the_same_timesteps(buckets):
    sampling = TimestepSampling(mode="flux_shift", num_timestep_buckets=buckets)
    rng = np.random.default_rng(0)
    batches = [rng.permutation(10)[:3].tolist() for _ in range(20)]
    whole = TimestepStream(sampling, 10, 9)
    expected = [whole.draw(batch, *CELLS) for batch in batches]
    first = TimestepStream(sampling, 10, 9)
    for batch in batches[:8]:
        first.draw(batch, *CELLS)
    state = first.state_dict()
    first.draw(batches[8], *CELLS)  # the saved state does not follow
    resumed = TimestepStream(sampling, 10, 9)
    resumed.load_state_dict(state)
    for batch, t in zip(batches[8:], expected[8:], strict=True):
        assert torch.equal(resumed.draw(batch, *CELLS), t)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (dict(seed=1), "seed 0, this run has 1"),
        (dict(item_count=4), "items 3, this run has 4"),
        (dict(sampling=TimestepSampling(num_timestep_buckets=2)), "num_timestep_buckets 0"),
    ],
)
def test_the_state_of_another_run_is_refused(other, sentence):
    state = TimestepStream(TimestepSampling(), 3, 0).state_dict()
    settings = dict(sampling=TimestepSampling(), item_count=3, seed=0) | other
    with pytest.raises(ValueError, match=sentence):
        TimestepStream(**settings).load_state_dict(state)


def test_seeds_differ_and_negative_ones_are_refused():
    a, b = (epochs(TimestepSampling(), 16, 1, seed) for seed in (0, 1))
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match="seed is -1; it must be 0 or more"):
        TimestepStream(TimestepSampling(), 3, -1)
    with pytest.raises(ValueError, match="item_count is 0"):
        TimestepStream(TimestepSampling(), 0, 1)
