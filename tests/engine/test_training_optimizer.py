"""Optimizers by name, and learning-rate schedules against closed forms and musubi-tuner."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from comfyui_braid.engine.training.optimizer import (
    Optimization,
    OptimizerSpec,
    find_optimizer_class,
)
from comfyui_braid.engine.training.schedule import LR_SCHEDULERS, rex

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
REX = json.loads((GOLDENS / "training_rex.json").read_text())


def groups(*rates):
    names = ("unet", "unet plus")
    return [
        {"params": [torch.nn.Parameter(torch.ones(3, 2))], "lr": rate, "name": name}
        for rate, name in zip(rates, names, strict=False)
    ]


def run(spec, *rates, steps=10):
    """(optimization, the rates each step was made with)."""
    built = Optimization(spec, groups(*(rates or (1e-3,))), steps)
    used = []
    for _ in range(steps):
        for group in built.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 0.1)
        built.optimizer.step()
        built.advance()
        used.append(built.last_learning_rates)
    return built, used


@pytest.mark.parametrize(
    "name, package",
    [
        ("AdamW", None),
        ("Adam", None),
        ("RAdam", None),
        ("SGD", None),
        ("Adagrad", None),
        ("torch.optim.NAdam", None),
        ("Adafactor", "transformers"),
        ("Prodigy", "prodigyopt"),
        ("AdamWScheduleFree", "schedulefree"),
        ("schedulefree.RAdamScheduleFree", "schedulefree"),
    ],
)
def test_every_named_optimizer_moves_its_weights_and_is_described_by_its_class(name, package):
    if package:
        pytest.importorskip(package)
    built, _ = run(OptimizerSpec(optimizer_type=name), 1.0 if name == "Prodigy" else 1e-2)
    (parameter,) = built.optimizer.param_groups[0]["params"]
    assert torch.isfinite(parameter).all() and not torch.equal(parameter, torch.ones(3, 2))
    kind = find_optimizer_class(name)
    assert built.description == f"{kind.__module__}.{kind.__name__}"


def test_arguments_reach_the_optimizer_and_its_description_is_musubis():
    spec = OptimizerSpec(optimizer_args={"weight_decay": 0.01, "betas": (0.9, 0.95)})
    built, _ = run(spec)
    assert built.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    # ss_optimizer of the golden run loraplus_accum2_norms
    assert built.description == "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.95))"


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("Nothing", "not an optimizer class"),
        ("torch.nn.Linear", "not an optimizer class"),
        ("torch.nowhere.AdamW", "not an optimizer class"),
        ("os.system('x')", "not an optimizer class"),
        ("..AdamW", "not an optimizer class"),
        ("surely_missing.Optimizer", "pip install surely_missing"),
    ],
)
def test_what_is_no_optimizer_is_refused_and_the_known_ones_are_named(name, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        find_optimizer_class(name)


@pytest.mark.parametrize(
    "name, package",
    [
        ("AdamW8bit", "bitsandbytes"),
        ("Prodigy", "prodigyopt"),
        ("AdamWScheduleFree", "schedulefree"),
    ],
)
def test_a_missing_package_is_one_sentence_with_its_pip_command(name, package, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)

    class Absent:
        def find_spec(self, fullname, path=None, target=None):
            if fullname.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ValueError, match=f"pip install {package}$"):
        find_optimizer_class(name)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"optimizer_args": {"lr": 1.0}}, "learning_rate of Train LoRA"),
        ({"optimizer_type": "Adafactor", "optimizer_args": {"relative_step": True}}, "ignore"),
        ({"lr_scheduler": "sawtooth"}, "warmup_stable_decay"),
        ({"lr_warmup_steps": 5}, "constant_with_warmup"),
        ({"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine"}, "warmup_steps in opt"),
        ({"optimizer_type": " "}, "AdamW"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        OptimizerSpec(**changes)


def test_an_unknown_optimizer_argument_is_refused_and_names_the_known_ones():
    with pytest.raises(ValueError, match="weight_decay"):
        run(OptimizerSpec(optimizer_args={"weigth_decay": 0.1}))


def test_loraplus_with_an_optimizer_that_finds_its_own_rate_is_refused_with_a_reason():
    for name in ("Prodigy", "dadaptation.DAdaptAdam"):
        with pytest.raises(ValueError, match="one rate for all"):
            Optimization(OptimizerSpec(optimizer_type=name), groups(1.0, 4.0), 10)


def test_prodigys_rate_times_its_distance_is_reported():
    pytest.importorskip("prodigyopt")
    built, _ = run(OptimizerSpec(optimizer_type="Prodigy"), 1.0)
    assert built.adapted_learning_rates()["unet"] > 0


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_schedule_runs_keeps_the_loraplus_ratio_and_goes_on_from_its_state(name):
    warmup = 0 if name == "constant" else 2
    spec = OptimizerSpec(lr_scheduler=name, lr_warmup_steps=warmup)
    built, used = run(spec, 1e-3, 4e-3)
    for low, high in used:
        assert high == pytest.approx(4 * low)
    if warmup:
        assert used[0][0] < used[1][0] < used[2][0] == pytest.approx(1e-3)
    half, _ = run(spec, 1e-3, 4e-3, steps=10)
    state = json.loads(json.dumps(half.state_dict()["schedule"]))
    again = Optimization(spec, groups(1e-3, 4e-3), 10)
    again.load_state_dict({**half.state_dict(), "schedule": state})
    assert [g["lr"] for g in again.optimizer.param_groups] == [
        g["lr"] for g in half.optimizer.param_groups
    ]


def test_schedules_end_where_their_definitions_say():
    _, used = run(OptimizerSpec(lr_scheduler="cosine"), steps=20)
    expected = [1e-3 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert [rate for (rate,) in used] == pytest.approx(expected)
    _, used = run(OptimizerSpec(lr_scheduler="cosine_with_min_lr"), steps=1000)
    assert used[-1][0] == pytest.approx(1e-4, rel=1e-3)
    _, used = run(OptimizerSpec(lr_scheduler="warmup_stable_decay", lr_warmup_steps=0.1), steps=100)
    assert used[9][0] < used[10][0] == used[79][0] == 1e-3 > used[81][0] > used[99][0]


@pytest.mark.parametrize(
    "name, arguments, sentence",
    [
        ("constant", {"power": 2}, "takes no arguments"),
        ("constant_with_warmup", {"num_cycles": 2}, "takes no arguments"),
        ("linear", {"power": 2}, "does not know power"),
        ("polynomial", {"pwoer": 2}, "it takes lr_end, power"),
        ("rex", {"alpha": 0.2}, "rex_alpha, rex_beta, min_lr_ratio"),
    ],
)
def test_a_schedule_argument_that_would_be_ignored_is_refused(name, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(OptimizerSpec(lr_scheduler=name, lr_scheduler_args=arguments))


def test_schedule_arguments_reach_the_schedule():
    spec = OptimizerSpec(lr_scheduler="inverse_sqrt", lr_scheduler_args={"timescale": 100})
    _, used = run(spec)
    assert used[-1][0] == pytest.approx(1e-3 / math.sqrt(1 + 9 / 100))


def rex_of(case):
    arguments = case["args"]
    spec = OptimizerSpec(
        lr_scheduler="rex",
        lr_warmup_steps=arguments["w"],
        lr_scheduler_args={
            ours: arguments[theirs]
            for theirs, ours in (
                ("rex_alpha", "rex_alpha"),
                ("rex_beta", "rex_beta"),
                ("minr", "min_lr_ratio"),
            )
            if theirs in arguments
        },
    )
    rates = [arguments["lr"] * ratio for ratio in arguments.get("groups", [1.0])]
    return run(spec, *rates, steps=arguments["n"])[1]


@pytest.mark.parametrize("case", REX["cases"], ids=lambda c: json.dumps(c["args"]))
def test_rex_after_its_warm_up_is_musubis(case):
    n, w = case["args"]["n"], case["args"]["w"]
    ours = rex_of(case)
    for step in range(w, n):
        if step == 1 == w:
            continue  # musubi's second step is a repeated minimum, see the next test
        assert ours[step] == pytest.approx(tuple(case["lr_used"][step])), step


@pytest.mark.parametrize("case", [c for c in REX["cases"] if c["args"]["w"]], ids=str)
def test_rex_warm_up_starts_low_and_keeps_the_ratio_where_musubi_does_neither(case):
    w, lr = case["args"]["w"], case["args"]["lr"]
    ours = rex_of(case)
    assert ours[0][0] == pytest.approx(0.01 * lr)
    assert all(a[0] < b[0] for a, b in zip(ours[:w], ours[1 : w + 1], strict=True))
    assert ours[w][0] == pytest.approx(lr)
    if w >= 2:
        assert case["lr_used"][0][0] > 0.7 * lr  # musubi: near the full rate at once, then minimal
        assert case["lr_used"][1][0] == pytest.approx(0.01 * lr)
    if "groups" in case["args"]:
        assert all(high == pytest.approx(4 * low) for low, high in ours)
        assert case["lr_used"][2][0] == case["lr_used"][2][1]  # musubi: one rate for both


def test_rex_ends_at_its_minimum():
    assert rex(10, steps=10, warmup_steps=0) == pytest.approx(0.01)
