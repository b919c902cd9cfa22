"""No number without a bound: in the schemas, and in what a linked node hands past them."""

import math
import tracemalloc

import pytest
import torch
from comfy_api.latest import io

from comfyui_braid.engine.magcache.plan import Conditions, Curve, MagCachePlan
from comfyui_braid.engine.magcache.rules import MagCacheRule, PlannedRule
from comfyui_braid.engine.magcache.schedule import plan_schedule
from comfyui_braid.engine.timesteps.sampling import TimestepSampling
from comfyui_braid.nodes import NODES
from comfyui_braid.nodes.ema.nodes import BraidEmaSweep
from comfyui_braid.nodes.magcache.cache import BraidMagCachePlan
from comfyui_braid.nodes.network import BraidNetwork
from comfyui_braid.nodes.playground import BraidPlaygroundDataset, BraidPlaygroundDecode
from comfyui_braid.nodes.timesteps.nodes import BraidTimestepPreview

PAPER = {"rule": "magcache", "threshold": 0.24, "retention_ratio": 0.2, "k": 6}
PLANNED = {"rule": "planned", "speedup": 2.0, "warmup_steps": 2}
HUGE = 10**9


def numbers(inputs):
    for each in inputs:
        if isinstance(each, io.DynamicCombo.Input):
            for option in each.options:
                yield from numbers(option.inputs)
        if isinstance(each, io.Int.Input | io.Float.Input):
            yield each


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_every_number_has_a_least_and_a_largest_value_and_its_default_between(node):
    for each in numbers(node.define_schema().inputs):
        ends = each.min, each.max
        assert all(end is not None and math.isfinite(end) for end in ends), each.id
        assert each.min <= each.default <= each.max, each.id
        if isinstance(each, io.Int.Input):
            assert all(isinstance(end, int) for end in ends), each.id


def preview(**values):
    default = dict(width=1024, height=1024, bins=50, samples=1000, seed=0)
    return BraidTimestepPreview.execute(TimestepSampling(), **default | values)


LINKED = {
    "samples of a preview": (lambda: preview(samples=HUGE), "samples is 1000000000; it must be"),
    "bins of a preview": (lambda: preview(bins=HUGE), "bins is 1000000000; it must be 1 or more"),
    "width of a preview": (lambda: preview(width=-5), "width is -5; it must be 1 or more"),
    "count of a dataset": (
        lambda: BraidPlaygroundDataset.execute("plain", HUGE, 0),
        "count is 1000000000; it must be 1 or more, at most 10000",
    ),
    "no pictures": (lambda: BraidPlaygroundDataset.execute("plain", 0, 0), "count is 0"),
    "scale of pictures": (
        lambda: BraidPlaygroundDecode.execute({"samples": torch.zeros(1, 16, 16, 16)}, 1000),
        "1.0e.09 pixels in all are more than 6.4e.07; lower scale",
    ),
    "pictures of very many latents": (
        lambda: BraidPlaygroundDecode.execute(
            {"samples": torch.zeros(1, 16, 1, 1).expand(10**8, -1, -1, -1)}
        ),
        "pixels in all are more",
    ),
    "steps of a plan": (
        lambda: BraidMagCachePlan.execute("FLUX.1-dev", "0", HUGE, PAPER),
        "steps: got 1000000000, MagCache Plan shows 1 to 1000",
    ),
    "sigmas of a plan": (
        lambda: BraidMagCachePlan.execute("FLUX.1-dev", "0", 1, PAPER, sigmas=torch.ones(2000)),
        "sigmas: got 2000 values, MagCache Plan shows 2 to 1001",
    ),
    "ratios": (
        lambda: BraidMagCachePlan.execute("from mag_ratios", "1," * 10_001, 20, PAPER),
        "mag_ratios: 10001 values in one line; at most 10000",
    ),
    "widths of a sweep": (
        lambda: BraidEmaSweep.execute(None, "0.1 " * 65),
        "sigma_rels holds 65 widths; at most 64",
    ),
    "network_dim": (
        lambda: BraidNetwork.execute("network_dim=1e9"),
        "network_dim=1000000000: must",
    ),
    "conv_dim": (lambda: BraidNetwork.execute("conv_dim=1000000"), "conv_dim=1000000: must be 1"),
    "k": (lambda: plan(100, PlannedRule(k=HUGE)), "k: got 1000000000, allowed are 0 to 32"),
    "not a number": (lambda: plan(100, PlannedRule(speedup=math.nan)), "speedup: got nan"),
    "no threshold": (lambda: plan(100, MagCacheRule(threshold=math.nan)), "threshold: got nan"),
    "steps of a planned run": (
        lambda: plan(1001, PlannedRule()),
        "rule 'planned' takes runs of up to 1000 steps, and this one has 1001",
    ),
    "steps of a run": (lambda: plan(10_001, MagCacheRule()), "steps: got 10001, MagCache takes"),
}


def calibration(steps):
    """A walk at random in 16 dimensions, so that a few steps can be predicted from others."""
    walk = torch.randn(steps, 16, generator=torch.Generator().manual_seed(0)).cumsum(0)
    inner = (walk @ walk.T / 16).tolist()
    sigmas = tuple(torch.linspace(1, 0, steps + 1).tolist())
    return MagCachePlan(
        name="walk",
        conditions=Conditions(steps=steps, sigmas=sigmas, measure="latent"),
        curves=(Curve(label="positive", ratios=(1.0,) * steps),),
        inner_products=tuple(tuple(row[: index + 1]) for index, row in enumerate(inner)),
    )


def plan(steps, rule):
    return plan_schedule(calibration(20), torch.linspace(1, 0, steps + 1).tolist(), rule)


@pytest.mark.parametrize("name", LINKED)
def test_a_number_that_a_link_hands_past_the_schema_is_one_sentence(name):
    call, sentence = LINKED[name]
    with pytest.raises(ValueError, match=sentence) as refusal:
        call()
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    "rule", [PlannedRule(k=6), MagCacheRule(k=HUGE, threshold=10.0)], ids=["planned", "magcache"]
)
def test_the_longest_run_is_planned_in_a_few_megabytes(rule):
    tracemalloc.start()
    try:
        schedule = plan(1000, rule)
        assert tracemalloc.get_traced_memory()[1] < 120e6
    finally:
        tracemalloc.stop()
    assert 0 < len(schedule.skipped) < 1000 and schedule.predicted_rms > 0


def test_a_switched_off_cache_runs_any_number_of_steps():
    assert plan(20_000, MagCacheRule(k=0)).skipped == ()
