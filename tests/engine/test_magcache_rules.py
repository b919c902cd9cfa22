"""The paper's rule against kohya-ss/musubi-tuner 30c658c, run on CPU."""

import json
from pathlib import Path

import pytest

from comfyui_braid.engine.magcache.curve import nearest_ratios
from comfyui_braid.engine.magcache.plan import plan_from_ratios
from comfyui_braid.engine.magcache.rules import MagCacheRule, accumulated_errors
from comfyui_braid.engine.magcache.schedule import plan_schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "magcache_decisions.json").read_text())
RATIOS = {
    **GOLDEN["ratio_sets"],
    "all_ones_10": [1.0] * 10,
    "list_of_3": [1.0, 1.1, 0.9],  # not in the file; the values that explain its cases
}


def even(steps: int) -> list[float]:
    return [1 - step / steps for step in range(steps + 1)]


def decide(ratios, steps, rule):
    return accumulated_errors([nearest_ratios(ratios, steps)], rule, [True] * steps)[0]


@pytest.mark.parametrize(
    "case",
    GOLDEN["cases"],
    ids=lambda c: f"{c['ratios']}-{c['N']}-{c['retention']}-{c['threshold']}-{c['K']}",
)
def test_skipped_steps_are_those_of_musubi(case):
    rule = MagCacheRule(
        threshold=case["threshold"],
        retention_ratio=case["retention"],
        k=case["K"],
        interpolation="nearest",
    )
    assert decide(RATIOS[case["ratios"]], case["N"], rule) == case["skipped"]


@pytest.mark.parametrize("case", GOLDEN["interpolated_ratios"], ids=lambda c: f"{c['N']}")
def test_nearest_picks_musubis_entries(case):
    ratios = RATIOS[case["ratios"]]
    expected = [ratios[index] for index in case["source_indices"]]
    assert nearest_ratios(ratios, case["N"]) == expected


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("interpolation", ["cumulative", "nearest"])
def test_runs_of_one_and_two_steps_are_computed(steps, interpolation):
    plan = plan_from_ratios("1,1,1,1")
    rule = MagCacheRule(retention_ratio=0.0, interpolation=interpolation)
    assert plan_schedule(plan, even(steps), rule).skipped == ()


def test_first_and_last_step_are_never_skipped():
    plan = plan_from_ratios(",".join(["1"] * 20))
    schedule = plan_schedule(plan, even(20), MagCacheRule(retention_ratio=0.0, k=100))
    assert schedule.skipped == tuple(range(1, 19))


@pytest.mark.parametrize("rule", [MagCacheRule(threshold=0.0), MagCacheRule(k=0)])
def test_threshold_or_k_of_zero_skips_nothing_even_where_the_ratio_is_one(rule):
    plan = plan_from_ratios(",".join(["1"] * 20))
    assert plan_schedule(plan, even(20), rule).skipped == ()


def test_a_step_is_skipped_only_when_every_conditioning_may_be():
    calm, wild = [1.0] * 10, [1.0, 1.0, 1.0, 1.5, 1.0, 1.0, 1.0, 1.5, 1.0, 1.0]
    rule = MagCacheRule(threshold=0.1, retention_ratio=0.0, k=9)
    skipped, _ = accumulated_errors([calm, wild], rule, [True] * 10)
    assert skipped == accumulated_errors([wild], rule, [True] * 10)[0]
    assert 3 not in skipped and 7 not in skipped


def test_steps_outside_the_allowed_range_are_computed_and_start_a_new_window():
    allowed = [step != 5 for step in range(10)]
    rule = MagCacheRule(threshold=9.0, retention_ratio=0.0, k=9)
    assert accumulated_errors([[1.0] * 10], rule, allowed)[0] == [1, 2, 3, 4, 6, 7, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold: got -0.1"),
        ({"retention_ratio": 1.5}, "retention_ratio: got 1.5"),
        ({"k": -1}, "k: got -1"),
        ({"interpolation": "linear"}, "allowed are cumulative and nearest"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        MagCacheRule(**settings)
