import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad

from comfyui_braid.engine.ema.profile import (
    centre_of_mass,
    cumulative_profile,
    gamma_from_sigma_rel,
    inner_product,
    power_beta,
    power_profile,
    sigma_rel_from_gamma,
)
from comfyui_braid.engine.ema.schedule import (
    BetaRamp,
    MusubiPower,
    Power,
    achieved_centre_of_mass,
    achieved_sigma_rel,
    betas_from_weights,
    merge_betas,
    power_weights,
    weights_from_betas,
)

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "ema_musubi.json").read_text())
IRREGULAR = [100, 200, 300, 400, 500, 1000, 1500, 2000]
EQUAL = list(range(1, 11))
CASES = [(EQUAL, 0.2), (IRREGULAR, 0.2), (IRREGULAR, 0.07), ([3, 4, 400], 0.28), ([0, 5, 9], 0.15)]


@pytest.mark.parametrize("case", GOLDEN["sigma_rel_to_gamma"], ids=lambda c: str(c["sigma_rel"]))
def test_gamma_is_musubis_bit_for_bit(case):
    assert gamma_from_sigma_rel(case["sigma_rel"]) == case["gamma"]


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.25, 0.28, 0.288675])
def test_sigma_rel_and_gamma_are_inverse(sigma_rel):
    assert sigma_rel_from_gamma(gamma_from_sigma_rel(sigma_rel)) == pytest.approx(sigma_rel, 1e-12)


def test_the_widest_average_is_the_plain_mean():
    assert gamma_from_sigma_rel(0.28868) == 0
    weights = power_weights(gamma_from_sigma_rel(12**-0.5), list(range(101)))
    assert weights[1:-1] == pytest.approx(np.full(99, 0.01), abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.2887, 0.29, 0.3, 0.5, 1.0])
def test_too_wide_a_profile_is_refused_with_the_reason(sigma_rel):
    with pytest.raises(ValueError, match=r"no average.*0\.28868.*beginning.*choose"):
        Power(sigma_rel=sigma_rel)
    with pytest.raises(ValueError, match="no average"):
        MusubiPower(sigma_rel=sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, float("nan")])
def test_no_width_at_all_is_refused(sigma_rel):
    with pytest.raises(ValueError, match="above 0"):
        Power(sigma_rel=sigma_rel)


def test_betas_outside_zero_to_one_are_refused():
    with pytest.raises(ValueError, match="beta2 is 1.5; it must be between 0 and 1"):
        BetaRamp(beta=0.5, beta2=1.5)


@pytest.mark.parametrize("case", GOLDEN["betas_and_effective_weights"]["cases"], ids=str)
def test_betas_are_musubis_bit_for_bit(case):
    wide = case.get("sigma_rel")
    schedule = MusubiPower(sigma_rel=wide) if wide else BetaRamp(**case["beta"])
    betas = merge_betas(schedule, range(1, case["num_files"] + 1))
    assert betas.tolist() == case["betas"]
    effective = case["effective_weight_of_each_file"]  # a float32 result
    assert weights_from_betas(betas) == pytest.approx(effective, abs=1e-6)


def test_musubis_power_weights_drop_the_first_file():
    weights = weights_from_betas(merge_betas(MusubiPower(sigma_rel=0.2), EQUAL))
    assert weights[0] == 0
    masses = np.diff(cumulative_profile(np.arange(10.0), 9.0, gamma_from_sigma_rel(0.2)))
    assert weights[1:] == pytest.approx(masses, abs=1e-15)


def _hat(knots, index, time):
    left = knots[index - 1] if index else None
    right = knots[index + 1] if index + 1 < len(knots) else None
    at = knots[index]
    if time <= at:
        return 1.0 if left is None else max(0.0, (time - left) / (at - left))
    return 0.0 if right is None else max(0.0, (right - time) / (right - at))


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("times,sigma_rel", CASES, ids=str)
def test_weights_are_the_integral_of_profile_times_hat(times, sigma_rel, windowed):
    gamma, end = gamma_from_sigma_rel(sigma_rel), float(times[-1])
    begin = times[0] if windowed else 0.0

    def integral(index):
        pieces = sorted({begin, *[t for t in times if t >= begin]})
        return sum(
            quad(
                lambda t: float(power_profile(np.float64(t), end, gamma)) * _hat(times, index, t),
                a,
                b,
                epsabs=1e-13,
                epsrel=1e-13,
            )[0]
            for a, b in zip(pieces, pieces[1:], strict=False)
        )

    expected = np.array([integral(i) for i in range(len(times))])
    expected /= 1 - (begin / end) ** (gamma + 1) if windowed else 1
    assert np.abs(power_weights(gamma, times, windowed) - expected).max() <= 1e-12


@pytest.mark.parametrize(
    "times", [[1, 999_998, 999_999, 1_000_000], list(range(70_001, 70_009)), [5e5, 5e5 + 1, 1e6]]
)
@pytest.mark.parametrize("gamma", [0, 1, 2, 17])
def test_files_a_step_apart_late_in_a_long_run_keep_their_digits(times, gamma):
    """Against exact fractions, which whole exponents allow."""
    end = Fraction(times[-1])
    knots = [Fraction(time) / end for time in times]

    def mean(a, b):
        return (b ** (gamma + 2) - a ** (gamma + 2)) / ((gamma + 2) * (b - a))

    means = [0, *(mean(a, b) for a, b in zip(knots, knots[1:], strict=False)), 1]
    exact = [float(b - a) for a, b in zip(means, means[1:], strict=False)]
    assert np.abs(power_weights(float(gamma), times) - exact).max() <= 1e-14


@pytest.mark.parametrize("times,sigma_rel", CASES, ids=str)
def test_weights_are_positive_and_sum_to_one(times, sigma_rel):
    for windowed in (False, True):
        weights = power_weights(gamma_from_sigma_rel(sigma_rel), times, windowed)
        assert weights.sum() == pytest.approx(1, abs=1e-14) and (weights >= 0).all()


def test_centre_of_mass_is_the_ideal_one_within_half_an_interval():
    gamma = gamma_from_sigma_rel(0.2)
    for count in (2, 5, 10, 100):
        times = [i + 1 for i in range(count)]
        centre = achieved_centre_of_mass(power_weights(gamma, times), times)
        assert centre == pytest.approx(centre_of_mass(gamma), abs=0.5 / count)


def test_irregular_spacing_keeps_the_centre_where_musubi_loses_it():
    gamma = gamma_from_sigma_rel(0.2)
    ours = power_weights(gamma, IRREGULAR)
    theirs = weights_from_betas(merge_betas(MusubiPower(sigma_rel=0.2), IRREGULAR))
    assert achieved_centre_of_mass(ours, IRREGULAR) == pytest.approx(0.7386, abs=1e-4)
    assert achieved_sigma_rel(ours, IRREGULAR) == pytest.approx(0.224, abs=1e-3)
    assert achieved_sigma_rel(theirs, IRREGULAR) == pytest.approx(0.295, abs=1e-3)


def test_a_window_is_the_whole_profile_cut_and_renormalised():
    gamma = gamma_from_sigma_rel(0.2)
    whole, window = power_weights(gamma, EQUAL), power_weights(gamma, EQUAL[5:], windowed=True)
    assert window[1:] == pytest.approx(whole[6:] / (1 - 0.6 ** (gamma + 1)), abs=1e-14)


def test_one_checkpoint_counts_fully_and_none_is_refused():
    assert power_weights(1.0, [7]).tolist() == [1.0]
    with pytest.raises(ValueError, match="no checkpoints"):
        power_weights(1.0, [])


def test_times_out_of_order_are_refused():
    with pytest.raises(ValueError, match="must increase"):
        power_weights(1.0, [3, 2, 5])


def test_betas_and_weights_are_inverse_down_to_vanishing_weights():
    for sigma_rel in (0.01, 0.05, 0.2):
        weights = power_weights(gamma_from_sigma_rel(sigma_rel), EQUAL)
        back = weights_from_betas(betas_from_weights(weights))
        assert back == pytest.approx(weights, abs=1e-15)


def test_the_recursion_of_equation_127_gives_the_profile_of_equation_121():
    gamma, steps = gamma_from_sigma_rel(0.15), 50
    weights = np.zeros(steps)
    for step in range(1, steps + 1):
        weights *= power_beta(gamma, step, 1)
        weights[step - 1] = 1 - power_beta(gamma, step, 1)
    masses = np.diff(cumulative_profile(np.arange(steps + 1.0), float(steps), gamma))
    assert weights == pytest.approx(masses, abs=1e-14)


def test_inner_product_is_the_integral_of_two_profiles():
    a, b = gamma_from_sigma_rel(0.1), gamma_from_sigma_rel(0.2)
    direct = quad(
        lambda t: (
            float(power_profile(np.float64(t), 3.0, a))
            * float(power_profile(np.float64(t), 5.0, b))
        ),
        0,
        3,
        epsabs=1e-14,
    )[0]
    assert inner_product(a, 3.0, b, 5.0) == pytest.approx(direct, rel=1e-11)
