from pathlib import Path

import numpy as np
import pytest

from comfyui_braid.engine.ema.average import plan_for_order
from comfyui_braid.engine.ema.figure import (
    bars_of,
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


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("windowed", [False, True])
def test_bars_of_neighbours_hold_their_weights_and_their_stretch_of_time(schedule, windowed):
    plan = plan_for_order(_order(range(3, 25), windowed), schedule)
    every, few = bars_of(plan), bars_of(plan, most=4)
    assert every.names == tuple(path.name for path in plan.order.files)
    np.testing.assert_array_equal(every.weights, plan.weights)
    np.testing.assert_array_equal(every.steps, plan.order.times)
    np.testing.assert_array_equal(every.borders, cells(plan.order.times, windowed))
    assert few.names == ("3 to 7", "8 to 13", "14 to 18", "19 to 24")
    assert few.steps.tolist() == [7, 13, 18, 24]
    np.testing.assert_allclose(few.weights[1], plan.weights[5:11].sum(), rtol=1e-12)
    np.testing.assert_array_equal(few.borders, every.borders[[0, 5, 11, 16, 22]])


def test_a_planned_run_weighs_as_the_same_run_once_it_has_saved():
    for schedule in SCHEDULES:
        planned = plan_for_order(planned_order(range(5, 500, 5), "steps"), schedule)
        trained = plan_for_order(_order(range(5, 500, 5)), schedule)
        assert planned.summary() | {"order_from": "test"} == trained.summary()
        np.testing.assert_array_equal(planned.weights, trained.weights)
        assert [path.name for path in planned.order.files[-2:]] == ["step 490", "step 495"]


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
