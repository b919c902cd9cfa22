"""Distance to the dense power-function average on synthetic runs, ours against musubi's."""

import numpy as np
import pytest

from comfyui_braid.engine.ema.profile import gamma_from_sigma_rel
from comfyui_braid.engine.ema.reconstruction import solve_reconstruction
from comfyui_braid.engine.ema.schedule import MusubiPower, Power, merge_betas, weights_from_betas
from comfyui_braid.engine.ema.shadows import SIGMA_RELS

STEPS, DIMENSIONS, NOISE = 2000, 200, 1.0


def _trajectory(cosine: bool, seed: int = 0):
    """SGD in a quadratic bowl with curvatures over three decades, (STEPS, DIMENSIONS)."""
    generator = np.random.default_rng(seed)
    curvature = np.logspace(-3, 0, DIMENSIONS)
    position = generator.normal(size=DIMENSIONS) * 3
    states = np.empty((STEPS, DIMENSIONS))
    for step in range(STEPS):
        rate = 0.1 * (0.5 * (1 + np.cos(np.pi * step / STEPS)) if cosine else 1.0)
        gradient = curvature * position + NOISE * generator.normal(size=DIMENSIONS)
        position = position - rate * gradient
        states[step] = position
    return states


TRAJECTORIES = {"constant": _trajectory(False), "cosine": _trajectory(True)}


def _dense(states, sigma_rel):
    edges = (np.arange(STEPS + 1) / STEPS) ** (gamma_from_sigma_rel(sigma_rel) + 1)
    return np.diff(edges) @ states


def _distance(schedule, states, count, dense):
    times = np.linspace(0, STEPS, count + 1)[1:].astype(int)
    weights = weights_from_betas(merge_betas(schedule, times.tolist()))
    return np.linalg.norm(weights @ states[times - 1] - dense)


@pytest.mark.parametrize("sigma_rel", [0.1, 0.15, 0.2, 0.25])
@pytest.mark.parametrize("rate", TRAJECTORIES)
def test_ten_files_come_nearer_to_the_dense_average_than_musubis_merge(rate, sigma_rel):
    states = TRAJECTORIES[rate]
    dense = _dense(states, sigma_rel)
    ours = _distance(Power(sigma_rel=sigma_rel), states, 10, dense)
    theirs = _distance(MusubiPower(sigma_rel=sigma_rel), states, 10, dense)
    assert ours <= 0.7 * theirs


def _shadow_distance(states, sigma_rel, dense):
    coefficients = solve_reconstruction(SIGMA_RELS, sigma_rel, STEPS).coefficients
    rebuilt = sum(
        x * _dense(states, stored) for x, stored in zip(coefficients, SIGMA_RELS, strict=True)
    )
    return np.linalg.norm(rebuilt - dense)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.1, 0.17, 0.23])
def test_shadows_come_within_one_percent_of_the_dense_average_at_a_constant_rate(sigma_rel):
    states = TRAJECTORIES["constant"]
    dense = _dense(states, sigma_rel)
    raw = np.linalg.norm(states[-1] - dense)
    assert _shadow_distance(states, sigma_rel, dense) <= 0.01 * raw


@pytest.mark.parametrize("sigma_rel", [0.06, 0.1, 0.17, 0.23])
@pytest.mark.parametrize("rate", TRAJECTORIES)
def test_shadows_come_at_least_twice_as_near_as_ten_files(rate, sigma_rel):
    states = TRAJECTORIES[rate]
    dense = _dense(states, sigma_rel)
    files = _distance(Power(sigma_rel=sigma_rel), states, 10, dense)
    assert _shadow_distance(states, sigma_rel, dense) <= 0.5 * files
