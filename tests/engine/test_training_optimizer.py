"""Optimizers by name, and learning-rate schedules against closed forms and musubi-tuner."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from comfyui_braid.engine.training.optimizers.optimizer import (
    Optimization,
    OptimizerSpec,
    find_optimizer_class,
)
from comfyui_braid.engine.training.optimizers.schedule import LR_SCHEDULERS, rex

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
        ("AdamW8bit", "bitsandbytes"),
        ("bitsandbytes.optim.AdEMAMix8bit", "bitsandbytes"),
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
        ("AdmW", "(did you mean AdamW?)"),
        ("LBFGS", "computes the loss several times a step"),
        ("LBFGS ", "not an optimizer class"),
        ("surely_missing.Optimizer", "not an optimizer class"),
        ("surely_missing." * 10_000, "not an optimizer class"),
    ],
)
def test_what_is_no_optimizer_is_refused_and_the_known_ones_are_named(name, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        find_optimizer_class(name)


@pytest.mark.parametrize("name", ["adamw", "ADAMW", "sgd"])
def test_short_names_are_known_in_any_case_as_in_musubi(name):
    assert find_optimizer_class(name).__name__.lower() == name.lower()


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
        ({"optimizer_type": "AdamWScheduleFree", "lr_warmup_steps": 5}, "warmup_steps in opt"),
        ({"optimizer_type": " "}, "AdamW"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        OptimizerSpec(**changes)


def test_an_unknown_optimizer_argument_is_refused_and_names_the_known_ones():
    with pytest.raises(ValueError, match="did you mean weight_decay.*known keys: amsgrad, betas"):
        run(OptimizerSpec(optimizer_args={"weigth_decay": 0.1}))


def test_an_optimizer_argument_of_the_wrong_kind_is_refused_with_its_value():
    with pytest.raises(ValueError, match="optimizer_args: AdamW refuses {'betas': 0.9}") as told:
        run(OptimizerSpec(optimizer_args={"betas": 0.9}))
    assert str(told.value).endswith("; by default it has betas=(0.9, 0.999)")
    assert "TypeError" not in str(told.value)


def test_adafactor_takes_its_learning_rate_under_its_dotted_name_too():
    pytest.importorskip("transformers")
    built, used = run(OptimizerSpec(optimizer_type="transformers.Adafactor"), 1e-2)
    assert used == [(1e-2,)] * 10 and not built.optimizer.param_groups[0]["relative_step"]


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


def test_a_longer_run_goes_on_at_the_rate_of_its_own_schedule():
    """The last rate of a finished cosine is 0; twice as long, its middle is half the full rate."""
    finished, _ = run(OptimizerSpec(lr_scheduler="cosine"), steps=10)
    assert finished.optimizer.param_groups[0]["lr"] == pytest.approx(0)
    longer = Optimization(OptimizerSpec(lr_scheduler="cosine"), groups(1e-3), 20)
    longer.load_state_dict(finished.state_dict())
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3)


@pytest.mark.parametrize(
    "share, steps, whole", [(0.15, 10, 1), (0.29, 100, 28), (0.99, 1, 0), (1, 10, 1), (7, 10, 7)]
)
def test_a_share_of_warm_up_is_cut_to_whole_steps_as_in_musubi(share, steps, whole):
    spec = OptimizerSpec(lr_scheduler="linear", lr_warmup_steps=share)
    assert spec.warmup_steps(steps) == whole


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
        ("polynomial", {"pwoer": 2}, "did you mean power.*it takes lr_end, power"),
        ("rex", {"alpha": 0.2}, "rex_alpha, rex_beta, min_lr_ratio"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "Only one of"),
    ],
)
def test_a_schedule_argument_that_would_be_ignored_is_refused(name, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(OptimizerSpec(lr_scheduler=name, lr_scheduler_args=arguments))


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("rex", {"rex_alpha": "x"}),
        ("rex", {"rex_alpha": 0, "rex_beta": 0}),
        ("rex", {"min_lr_ratio": None}),
        ("rex", {"rex_alpha": -0.5}),
        ("polynomial", {"power": -1}),  # divides by zero, but after the last step only
        ("polynomial", {"lr_end": 1.0}),
        ("inverse_sqrt", {"timescale": 0}),
        ("cosine_with_restarts", {"num_cycles": "three"}),
        ("warmup_stable_decay", {"decay_type": "zigzag"}),
    ],
    ids=str,
)
def test_a_schedule_that_would_break_the_run_in_its_middle_is_refused_at_its_start(name, arguments):
    with pytest.raises(ValueError, match=f"lr_scheduler_args: {name} refuses"):
        Optimization(
            OptimizerSpec(lr_scheduler=name, lr_scheduler_args=arguments), groups(1e-3), 10
        )


def test_rex_without_alpha_ends_at_its_minimum_and_not_in_a_division_by_zero():
    spec = OptimizerSpec(lr_scheduler="rex", lr_scheduler_args={"rex_alpha": 0})
    built, _ = run(spec)
    assert built.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_min_lr_ratio_is_understood_where_transformers_calls_it_min_lr_rate():
    spec = OptimizerSpec(
        lr_scheduler="cosine_with_min_lr", lr_scheduler_args={"min_lr_ratio": 0.25}
    )
    _, used = run(spec, steps=1000)
    assert used[-1][0] == pytest.approx(0.25e-3, rel=1e-3)


def test_stable_steps_alone_leave_the_rest_of_the_run_for_the_decay():
    spec = OptimizerSpec(
        lr_scheduler="warmup_stable_decay",
        lr_warmup_steps=2,
        lr_scheduler_args={"num_stable_steps": 3, "decay_type": "linear"},
    )
    _, used = run(spec)
    assert [rate for (rate,) in used[2:]] == pytest.approx(
        [1e-3] * 3 + [1e-3 * left / 5 for left in (5, 4, 3, 2, 1)]
    )


def test_decay_steps_below_1_are_a_share_of_the_run_as_lr_decay_steps_is_in_musubi():
    """From get_lr_scheduler of musubi-tuner 30c658c: warm-up 0.2, decay 0.35 (3 steps) of 10."""
    spec = OptimizerSpec(
        lr_scheduler="warmup_stable_decay",
        lr_warmup_steps=0.2,
        lr_scheduler_args={"num_decay_steps": 0.35},
    )
    _, used = run(spec)
    musubis = [0.0, 0.5e-3, *[1e-3] * 6, 0.75e-3, 0.25e-3]
    assert [rate for (rate,) in used] == pytest.approx(musubis)


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


def test_state_is_loaded_in_the_precision_it_was_kept_in():
    """torch casts it to the dtype of the weights; ProdigyPlus keeps some of it in bfloat16."""
    spec = OptimizerSpec(optimizer_type="SGD", optimizer_args={"momentum": 0.9})
    first, _ = run(spec)
    (state,) = first.optimizer.state.values()
    state["momentum_buffer"] = state["momentum_buffer"].bfloat16()
    second, _ = run(spec)
    second.load_state_dict(first.state_dict())
    (loaded,) = second.optimizer.state.values()
    assert loaded["momentum_buffer"].dtype == torch.bfloat16
    assert torch.equal(loaded["momentum_buffer"], state["momentum_buffer"])
