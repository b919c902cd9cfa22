"""Against kohya-ss/musubi-tuner 30c658c; a test of a difference on purpose says by which rule."""

import json
import math
from pathlib import Path

import pytest
import torch

from comfyui_braid.engine.timesteps.sampling import RESOLUTION_SHIFTS, TimestepSampling
from comfyui_braid.engine.timesteps.weighting import LOSS_WEIGHTS

GOLDENS = json.loads(
    (Path(__file__).parent.parent / "goldens" / "timesteps_sampling.json").read_text()
)
CASES = {case["name"]: case for case in GOLDENS["cases"]}
U = torch.tensor(GOLDENS["uniform_inputs"], dtype=torch.float64)
MUSUBI_EPSILON = 1e-7
"""musubi clamps u to this distance from 0 and 1 before its float32 erfinv."""
SHARED = [name for name, case in CASES.items() if "mapped_from_uniform" in case]
SHARED.remove("inverted 800-200 no preserve (no validation)")
OPPOSITE_ENDS = ["sigma 0-500", "sigma 0-500 preserve (ignored)"]
BELLS = [
    name
    for name in SHARED
    if "min_timestep" not in CASES[name]["args"]
    and CASES[name]["args"]["timestep_sampling"] not in ("uniform", "ideogram4_shift")
]
"""Whole logit-normals that musubi does not clamp."""
MUSUBI_SHARES = {
    "qinglong_flux": dict(mid_ratio=0.79, logsnr_ratio=0.11, logsnr2_ratio=0.10),
    "qinglong_qwen": dict(mid_ratio=0.95, logsnr_ratio=0.0, logsnr2_ratio=0.05),
}
STATISTICS = [name for name in CASES if "inverted" not in name and name not in OPPOSITE_ENDS]


def sampling(case: dict, **more) -> TimestepSampling:
    args = dict(case["args"])
    return TimestepSampling(mode=args.pop("timestep_sampling"), **args, **more)


def musubi_direction(case: dict, u: torch.Tensor) -> torch.Tensor:
    """Rule: from_uniform is a quantile function and rises with u. musubi's logsnr falls with u
    (t = sigmoid(-L/2)); the distribution is the same, so its u is our 1 - u."""
    return 1.0 - u if case["args"]["timestep_sampling"] == "logsnr" else u


@pytest.mark.parametrize("name", SHARED)
def test_explicit_uniforms_map_to_musubi_t_to_1e_6(name):
    case = CASES[name]
    inner = (U >= 1e-3) & (U < 1.0)  # the tails: next test
    distribution = sampling(case).distribution(*case["latent_hw"])
    ours = distribution.from_uniform(musubi_direction(case, U))
    theirs = torch.tensor(case["mapped_from_uniform"], dtype=torch.float64)
    assert (ours - theirs)[inner].abs().max() < 1e-6


@pytest.mark.parametrize("name", BELLS)
def test_tails_differ_from_musubi_only_by_its_float32_erfinv(name):
    """Rule: float64 throughout and no clamp. musubi stops at u = 1e-7 and its float32 erfinv is up
    to 0.06 standard deviations off there; ours is exact and reaches 0 and 1."""
    case = CASES[name]
    distribution = sampling(case).distribution(*case["latent_hw"])
    ends = distribution.from_uniform(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [0.0, 1.0]
    tail = torch.tensor([MUSUBI_EPSILON, 1e-6, 1.0 - MUSUBI_EPSILON], dtype=torch.float64)
    ours = distribution.from_uniform(musubi_direction(case, tail))
    theirs = torch.tensor(case["mapped_from_uniform"], dtype=torch.float64)[[1, 2, 15]]
    assert ((ours.logit() - theirs.logit()) / distribution.std).abs().max() < 0.06


@pytest.mark.parametrize("pixels", [512, 1024, 2048])
def test_what_musubi_clamps_of_ideogram4_shift_is_next_to_nothing(pixels):
    """Rule: no clamp, so that the distribution is a logit-normal. musubi moves what lies beyond
    log-SNR 15 and -18 to these ends."""
    distribution = TimestepSampling(mode="ideogram4_shift").distribution(pixels // 16, pixels // 16)
    ends = [1.0 / (1.0 + math.exp(0.5 * snr)) for snr in (15.0, -18.0)]
    assert distribution.mass(0.0, ends[0]) + distribution.mass(ends[1], 1.0) < 1e-5


@pytest.mark.parametrize("name", STATISTICS)
def test_mean_std_and_deciles_agree_within_sampling_error(name):
    """Rule for qinglong: our shares are the document's; musubi's newer ones are given here.
    Rule for sigma: our t is continuous, musubi's is the upper end of a 1/1000 step."""
    case = CASES[name]
    shares = MUSUBI_SHARES.get(case["args"]["timestep_sampling"], {})
    draws = case.get("draws", 100_000)
    step = 0.0005 if name.startswith("sigma") else 0.0
    distribution = sampling(case, **shares).distribution(*case["latent_hw"])
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t = distribution.from_uniform(u) + step
    stats, error = case["stats"], t.std().item() / math.sqrt(draws)
    assert abs(t.mean().item() - stats["mean"]) < 4.5 * error
    assert abs(t.std().item() - stats["std"]) < 4.5 * error
    deciles = torch.tensor(stats["deciles_10_to_90"], dtype=torch.float64) - step
    tenths = torch.arange(1, 10, dtype=torch.float64) / 10
    assert (distribution.cdf(deciles) - tenths).abs().max() < 4.5 * math.sqrt(0.25 / draws) + step


@pytest.mark.parametrize("name", OPPOSITE_ENDS)
def test_sigma_mode_means_the_same_end_as_every_other_mode(name):
    """Rule: min_timestep and max_timestep are 1000 t in every mode, t = 1 pure noise. musubi's
    sigma mode counts from the other end: its 0-500 lies in t 0.5-1; ours in 0-0.5."""
    case = CASES[name]
    t = sampling(case).distribution(2, 2).from_uniform(U)
    assert (t.min().item(), t.max().item()) == (0.0, 0.5)
    mirrored = torch.tensor(case["stats"]["mean"], dtype=torch.float64)
    assert abs(t[U == 0.5].item() - (1.0 - mirrored)) < 2e-3


def test_an_inverted_range_is_refused_where_musubi_trains_on_it():
    with pytest.raises(ValueError, match="min_timestep is 800 and max_timestep is 200"):
        sampling(CASES["inverted 800-200 no preserve (no validation)"])


def test_sigma_logit_normal_keeps_musubis_sign_of_logit_mean():
    case = CASES["sigma logit_normal mean 1 std 0.5"]
    median = sampling(case).distribution(2, 2).from_uniform(torch.tensor(0.5, dtype=torch.float64))
    assert median < 0.3


def test_the_qinglong_shares_are_the_documents():
    """Rule: 80 / 7.5 / 12.5 % for both hybrids, as the customer's document states; musubi's code
    has since changed to 79/11/10 and 95/0/5."""
    for mode in ("qinglong_flux", "qinglong_qwen"):
        distribution = TimestepSampling(mode=mode).distribution(128, 128)
        assert distribution.shares == pytest.approx((0.80, 0.075, 0.125))


def test_preserved_ranges_have_the_statistics_of_musubis_accepted_draws():
    """Means and stds of musubi's rejection sampling, from its specification (section 10)."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for settings, mean, std in (
        (dict(mode="shift", discrete_flow_shift=3.0, min_timestep=500), 0.766, 0.123),
        (dict(mode="sigmoid", min_timestep=875), 0.907, 0.024),
    ):
        cut = TimestepSampling(preserve_distribution_shape=True, **settings)
        t = cut.distribution(2, 2).from_uniform(u)
        assert t.mean().item() == pytest.approx(mean, abs=1e-3)
        assert t.std().item() == pytest.approx(std, abs=1e-3)


@pytest.mark.parametrize("row", GOLDENS["mu_table"], ids=lambda r: f"{r['h']}x{r['w']}")
def test_log_shifts_follow_the_resolution_as_in_musubi(row):
    for mode in ("flux", "qwen"):
        ours = RESOLUTION_SHIFTS[f"{mode}_shift"].log_shift(row["h"], row["w"])
        assert ours == pytest.approx(row[f"{mode}_mu"], abs=1e-12)
    packed = RESOLUTION_SHIFTS["flux2_shift"].log_shift(row["h"] // 2, row["w"] // 2)
    assert packed == pytest.approx(row["flux_mu"], abs=1e-12)


def test_the_mode_distribution_follows_musubis_formula():
    golden = GOLDENS["mode_density_formula"]
    distribution = TimestepSampling(weighting_scheme="mode").distribution(2, 2)
    u = torch.tensor(golden["u"], dtype=torch.float64)
    index = torch.tensor(golden["u_prime"], dtype=torch.float64)  # counts from noise to clean
    assert (distribution.from_uniform(u) - (1.0 - index)).abs().max() < 1e-6


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none"])
def test_loss_weights_equal_musubis_on_its_grid(scheme):
    golden = GOLDENS["loss_weighting_at_timesteps"]
    t = torch.tensor(golden["timesteps"], dtype=torch.float64) / 1000
    expected = torch.tensor([w if w else 1.0 for w in golden[scheme]], dtype=torch.float64)
    assert LOSS_WEIGHTS[scheme](t) == pytest.approx(expected, rel=1e-6)


def test_loss_weights_apply_to_their_own_sample():
    """Rule: one weight per sample. musubi's 5-D weight broadcasts over the batch of 4-D latents and
    gives every sample the mean weight (loss_4d); ours gives own_sample_weighting."""
    golden = GOLDENS["loss_weight_broadcast"]
    t = torch.tensor(golden["timesteps"], dtype=torch.float64) / 1000
    weight = TimestepSampling(mode="uniform", weighting_scheme="cosmap").loss_weight(t)
    assert weight.shape == t.shape
    per_sample = torch.tensor(golden["target_per_sample"], dtype=torch.float64) ** 2
    loss = (weight * per_sample).mean().item()
    assert loss == pytest.approx(golden["own_sample_weighting"], rel=1e-6)
    assert loss != pytest.approx(golden["loss_4d"], rel=0.1)


def test_a_pool_value_passes_through_the_mode_and_the_timestep_is_the_noise_level():
    """Rule: the model is told 1000 t, the noise level used; musubi tells it 1000 t + 1."""
    golden = GOLDENS["pool_value_then_mode"]
    distribution = TimestepSampling(mode="shift", discrete_flow_shift=3.0).distribution(2, 2)
    t = distribution.from_uniform(torch.tensor(golden["pool_values"], dtype=torch.float64))
    assert t == pytest.approx(torch.tensor(golden["t"], dtype=torch.float64), abs=1e-6)
    offset = torch.tensor(golden["timesteps"], dtype=torch.float64) - 1000 * t
    assert offset == pytest.approx(torch.ones(4, dtype=torch.float64), abs=1e-3)
