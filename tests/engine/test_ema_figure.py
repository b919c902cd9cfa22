from pathlib import Path

import numpy as np
import pytest

from comfyui_braid.engine.ema.average import plan_for_order
from comfyui_braid.engine.ema.figure import (
    cells,
    draw_reconstruction,
    draw_weights,
    ideal_curve,
)
from comfyui_braid.engine.ema.order import TrainedOrder, planned_order
from comfyui_braid.engine.ema.reconstruction import solve_reconstruction
from comfyui_braid.engine.ema.schedule import BetaRamp, MusubiPower, Power
from comfyui_braid.engine.ema.shadows import SIGMA_RELS

SCHEDULES = [Power(sigma_rel=0.2), MusubiPower(sigma_rel=0.1), BetaRamp(beta=0.9, beta2=0.95)]


def _order(times, windowed=False):
    return TrainedOrder(
        files=tuple(Path(str(t)) for t in times),
        times=tuple(map(float, times)),
        unit="steps",
        order_from="test",
        windowed=windowed,
    )


def test_cells_cover_the_run_or_the_window_without_gaps():
    assert cells((2, 4, 10), windowed=False).tolist() == [0, 3, 7, 10]
    assert cells((2, 4, 10), windowed=True).tolist() == [2, 3, 7, 10]


def _share_of_bars(image):
    return float((image[..., 2].astype(int) - image[..., 0] > 51).mean())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("times", [[5], [100, 200, 1000], list(range(1, 41))], ids=len)
def test_every_plan_gives_a_picture_with_bars_in_it(schedule, times):
    image = draw_weights(plan_for_order(_order(times), schedule))
    assert image.shape == (576, 1024, 3) and image.dtype == np.uint8
    assert _share_of_bars(image) > 0.01


@pytest.mark.parametrize("times", [[5], [100, 200, 1000]], ids=len)
def test_a_window_gives_a_picture_too(times):
    image = draw_weights(plan_for_order(_order(times, windowed=True), SCHEDULES[0]))
    assert _share_of_bars(image) > 0.001


def test_the_ideal_curve_holds_the_mass_of_the_profile():
    time, density = ideal_curve(
        plan_for_order(planned_order(range(1, 11), "files"), Power(sigma_rel=0.2)), 5000
    )
    assert np.trapezoid(density, time) == pytest.approx(1, abs=1e-4)
    assert ideal_curve(plan_for_order(planned_order(range(1, 4), "files"), SCHEDULES[2])) is None


def test_a_reconstruction_gives_a_picture():
    image = draw_reconstruction(solve_reconstruction(SIGMA_RELS, 0.15, 1000))
    assert image.shape == (576, 1024, 3) and image.dtype == np.uint8
