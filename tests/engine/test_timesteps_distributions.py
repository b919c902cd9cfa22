"""Distributions: quantile, CDF and density agree, ranges are exact, bad settings are refused."""

import math

import pytest
import torch

from comfyui_braid.engine.timesteps.sampling import MODES, TimestepSampling
from comfyui_braid.engine.timesteps.stream import TimestepStream

CELLS = (128, 96)
DISTRIBUTIONS = {mode: dict(mode=mode) for mode in MODES} | {
    "sigma/logit_normal": dict(weighting_scheme="logit_normal", logit_mean=0.5),
    "sigma/mode": dict(weighting_scheme="mode"),
    "sigma/mode negative": dict(weighting_scheme="mode", mode_scale=-0.9),
    "logsnr paper": dict(mode="logsnr", logit_mean=-6.0, logit_std=2.0),
    "qinglong paper": dict(mode="qinglong_flux", logit_mean=-6.0, logit_std=2.0),
}
RANGES = {
    "": {},
    "squeezed": dict(min_timestep=200, max_timestep=800),
    "cut": dict(min_timestep=200, max_timestep=800, preserve_distribution_shape=True),
}
FAMILY = [
    pytest.param(distribution | limits, id=f"{name} {range_name}".strip())
    for name, distribution in DISTRIBUTIONS.items()
    for range_name, limits in RANGES.items()
]


def distribution_of(settings: dict):
    return TimestepSampling(**settings).distribution(*CELLS)


def grid(points: int) -> torch.Tensor:
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points


@pytest.mark.parametrize(
    "settings",
    [
        p
        for p in FAMILY
        if p.id in DISTRIBUTIONS or p.id in ("shift squeezed", "shift cut", "qinglong_flux cut")
    ],
)
def test_a_million_draws_lie_within_2e_3_of_the_closed_form_cdf(settings):
    count = 1_000_000
    sampling = TimestepSampling(**settings)
    t = TimestepStream(sampling, count, seed=1).draw(range(count), *CELLS).sort().values
    cdf = sampling.distribution(*CELLS).cdf(t)
    step = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((cdf - step[:-1]).abs().max(), (step[1:] - cdf).abs().max())
    assert distance.item() <= 2e-3


@pytest.mark.parametrize("settings", FAMILY)
def test_the_density_is_the_slope_of_the_cdf(settings):
    distribution, h = distribution_of(settings), 1e-6
    t = grid(500)
    t = t[(t - 0.2).abs().gt(1e-3) & (t - 0.8).abs().gt(1e-3) & (t - 0.5).abs().gt(1e-3)]
    slope = (distribution.cdf(t + h) - distribution.cdf(t - h)) / (2 * h)
    density = distribution.density(t)
    assert (slope - density).abs().max() <= 1e-6 * (1 + density.max())


@pytest.mark.parametrize("settings", [p for p in FAMILY if "qinglong" not in p.id])
def test_a_single_distribution_maps_u_back_to_itself_and_rises(settings):
    distribution, u = distribution_of(settings), grid(999)
    t = distribution.from_uniform(u)
    assert (t.diff() > 0).all()
    assert (distribution.cdf(t) - u).abs().max() < 1e-12


@pytest.mark.parametrize("settings", FAMILY)
def test_the_ends_stay_in_the_range_and_the_cdf_ends_at_0_and_1(settings):
    sampling = TimestepSampling(**settings)
    distribution = sampling.distribution(*CELLS)
    t = distribution.from_uniform(
        torch.tensor([0.0, 2.0**-60, 1.0 - 2.0**-53, 1.0], dtype=torch.float64)
    )
    assert ((t >= sampling.low) & (t <= sampling.high)).all()
    ends = torch.tensor([sampling.low, sampling.high], dtype=torch.float64)
    assert distribution.cdf(ends).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    assert torch.isfinite(distribution.density(ends)).all()
    outside = torch.tensor([-0.01, 1.01], dtype=torch.float64)
    assert distribution.density(outside).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_cut_distribution_is_the_whole_one_given_the_range(name):
    whole = distribution_of(DISTRIBUTIONS[name])
    cut = distribution_of(DISTRIBUTIONS[name] | RANGES["cut"])
    t = 0.2 + 0.6 * grid(200)
    below, mass = whole.cdf(torch.tensor(0.2, dtype=torch.float64)), whole.mass(0.2, 0.8)
    assert (cut.cdf(t) - (whole.cdf(t) - below) / mass).abs().max() < 1e-9
    assert (cut.density(t) - whole.density(t) / mass).abs().max() < 1e-9


def test_a_cut_distribution_equals_what_rejection_would_accept():
    settings = dict(mode="qinglong_flux", logit_mean=-6.0, logit_std=2.0)
    drawn = distribution_of(settings).from_uniform(
        torch.rand(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    accepted = drawn[(drawn >= 0.2) & (drawn <= 0.8)].sort().values
    cut = distribution_of(settings | RANGES["cut"])
    step = (torch.arange(len(accepted), dtype=torch.float64) + 0.5) / len(accepted)
    assert (cut.cdf(accepted) - step).abs().max() < 2.0 / math.sqrt(len(accepted))


def test_a_range_of_no_mass_is_refused_and_names_the_mass():
    with pytest.raises(ValueError, match=r"min_timestep 0 to max_timestep 5 holds 6e-08"):
        TimestepSampling(mode="sigmoid", max_timestep=5, preserve_distribution_shape=True)


def test_a_range_of_no_mass_is_refused_once_the_resolution_is_known():
    sampling = TimestepSampling(
        mode="flux_shift", max_timestep=10, preserve_distribution_shape=True
    )
    with pytest.raises(ValueError, match="widen the range"):
        sampling.distribution(256, 256)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(mode="sigmod"), "is 'sigmod' .did you mean sigmoid.*; choose one of sigma, uniform"),
        (dict(weighting_scheme="cos"), "is 'cos' .did you mean cosmap.*; choose one of none"),
        (dict(discrete_flow_shift=0.0), "discrete_flow_shift is 0.0; it must be a number above 0"),
        (dict(sigmoid_scale=-1.0), "sigmoid_scale is -1.0"),
        (dict(logit_std=math.nan), "logit_std is nan"),
        (dict(logit_mean=math.inf), "logit_mean is inf; it must be a finite number"),
        (dict(mode_scale=1.8), "mode_scale is 1.8; it must be between -1 and 1.75"),
        (dict(mid_ratio=-0.1), "each must be 0 or more"),
        (dict(mid_ratio=0.0, logsnr_ratio=0.0, logsnr2_ratio=0.0), "at least one above 0"),
        (dict(min_timestep=500, max_timestep=500), "0 <= min < max <= 1000"),
        (dict(max_timestep=1001), "max_timestep is 1001"),
        (dict(num_timestep_buckets=-1), "num_timestep_buckets is -1; it must be 0 or 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TimestepSampling(**settings)


def test_shares_are_relative_and_a_share_of_zero_leaves_its_distribution_out():
    doubled = TimestepSampling(
        mode="qinglong_qwen", mid_ratio=1.9, logsnr_ratio=0.0, logsnr2_ratio=0.1
    )
    assert doubled.distribution(*CELLS).shares == pytest.approx((0.95, 0.05))
    alone = TimestepSampling(mode="qinglong_flux", logsnr_ratio=0.0, logsnr2_ratio=0.0)
    assert alone.distribution(*CELLS) == TimestepSampling(mode="flux_shift").distribution(*CELLS)


def test_the_default_is_flat_and_unweighted():
    default = TimestepSampling()
    u = grid(100)
    assert torch.equal(default.distribution(*CELLS).from_uniform(u), u)
    assert torch.equal(default.loss_weight(u), torch.ones(100, dtype=torch.float64))


def test_only_the_resolution_modes_look_at_the_size_of_the_latent():
    for mode in MODES:
        sampling = TimestepSampling(mode=mode)
        same = sampling.distribution(64, 64) == sampling.distribution(128, 128)
        assert same is not sampling.depends_on_resolution
