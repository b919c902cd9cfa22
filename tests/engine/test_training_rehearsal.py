"""What would break a run's first steps is refused before work starts, in one sentence."""

import random
import sys

import numpy as np
import pytest
import torch

from comfyui_braid.engine.training.optimizers.optimizer import Optimization, OptimizerSpec
from comfyui_braid.engine.training.optimizers.rehearsal import rehearse
from comfyui_braid.engine.training.plan import MAX_STEPS, TrainingPlan


def groups(rate=1e-4, shapes=((4, 300), (300, 4))):
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    return [{"params": parameters, "lr": rate, "name": "unet"}]


def spec(name="AdamW", **arguments):
    return OptimizerSpec(optimizer_type=name, optimizer_args=arguments)


@pytest.mark.parametrize(
    "settings, reason",
    [
        (spec("SparseAdam"), "SparseAdam does not support dense gradients"),
        (spec(capturable=True), "capturable"),
        (spec(betas=(0.9,)), "something is missing"),
        (spec(betas=(0.9, 0.99, 0.999)), "too many values to unpack"),
        (spec(betas=()), "something is missing"),
        (spec(betas="text"), "it needs a value of another kind"),
        (spec(differentiable=True), "in-place operation"),
        (spec(eps="nan"), "it needs a value of another kind"),
        (spec(weight_decay=1e15), "first steps take weights of 0.1 to 1e"),
        (spec("Adam", weight_decay="much"), "it needs a value of another kind"),
        (spec("SGD", momentum=1e15), "first steps take weights"),
        (spec("Adagrad", initial_accumulator_value=1e15, eps=-1.0), "Invalid epsilon"),
        (spec("Adadelta", rho=(1, 2)), "it needs a value of another kind"),
        (spec("Muon", ns_steps=10**7), "must be less than 100"),
        (spec("Rprop", etas=(0.5,)), "something is missing"),
        (spec("Adagrad", lr_decay=None), "it needs a value of another kind"),
        (spec("AdamWScheduleFree", betas=0), "cannot unpack"),
        (spec("schedulefree.RAdamScheduleFree", r=10**7), "too large"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_arguments_that_would_break_the_first_steps_are_refused_in_one_sentence(settings, reason):
    if settings.is_schedule_free:
        pytest.importorskip("schedulefree")
    with pytest.raises(ValueError, match=reason) as refused:
        rehearse(settings, groups(), 10)
    sentence = str(refused.value)
    assert settings.optimizer_type in sentence and "\n" not in sentence and len(sentence) < 700


class Looping(torch.optim.SGD):
    """As those Newton-Schulz optimizers whose number of iterations is an argument."""

    def __init__(self, params, lr, iterations):
        super().__init__(params, lr)
        self.iterations = iterations

    def step(self, closure=None):
        for _ in range(self.iterations):
            self.param_groups[0]["params"][0].norm()
        return super().step(closure)


class Exiting(torch.optim.SGD):
    """As lion_pytorch's, with use_triton where triton is missing."""

    def __init__(self, params, lr, at):
        super().__init__(params, lr)
        self.at = at
        if at == "once":
            sys.exit()

    def step(self, closure=None):
        sys.exit(self.at)


@pytest.mark.parametrize("at", ["once", "step"])
def test_an_optimizer_that_would_end_the_program_is_refused(at):
    settings = OptimizerSpec(optimizer_class=Exiting, optimizer_args={"at": at})
    with pytest.raises(ValueError, match="it would end the program"):
        rehearse(settings, groups(), 10)


def test_a_loop_as_long_as_a_workflow_likes_is_left_after_so_many_operations():
    settings = OptimizerSpec(optimizer_class=Looping, optimizer_args={"iterations": 100})
    rehearse(settings, groups(), 10)
    settings = OptimizerSpec(optimizer_class=Looping, optimizer_args={"iterations": 10**7})
    with pytest.raises(ValueError, match="over 100000 operations"):
        rehearse(settings, groups(), 10)


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf"), 1e300, -1e16, {1}, b"x", 1j, ..., 10**8, 16**5000],
    ids=lambda bad: type(bad).__name__,
)
@pytest.mark.parametrize(
    "wrapped", [lambda bad: bad, lambda bad: (0.9, [bad]), lambda bad: {"a": bad}]
)
def test_only_plain_finite_values_are_arguments(bad, wrapped):
    for option in ("optimizer_args", "lr_scheduler_args"):
        with pytest.raises(ValueError, match=f"{option}: x=.*is not a finite number"):
            OptimizerSpec(**{option: {"x": wrapped(bad)}})


def test_the_rehearsal_leaves_weights_gradients_and_random_states_alone():
    given = groups()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = torch.rand(3), random.random(), np.random.random()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    rehearse(spec("torch.optim.NAdam"), given, 10)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.random()) == expected[1:]
    assert all(torch.equal(p, torch.ones_like(p)) and p.grad is None for p in given[0]["params"])


def test_the_rehearsal_runs_inside_inference_mode_where_comfyui_calls_nodes():
    parameters = groups()
    with torch.inference_mode():
        rehearse(spec(), parameters, 10)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("cosine_with_min_lr", {"min_lr_ratio": 1e15}),
        ("cosine_with_min_lr", {"min_lr": 1e15}),
        ("rex", {"min_lr_ratio": 101}),
        ("rex", {"rex_alpha": 1, "rex_beta": -1.05}),
        ("polynomial", {"power": -2}),
        ("warmup_stable_decay", {"num_decay_steps": "all"}),
        ("warmup_stable_decay", {"num_stable_steps": "most"}),
        ("warmup_stable_decay", {"num_stable_steps": [1]}),
        ("warmup_stable_decay", {"min_lr_ratio": -1}),
        ("cosine", {"num_cycles": {}}),
    ],
    ids=str,
)
def test_a_rate_that_leaves_its_bounds_at_any_step_is_refused(name, arguments):
    settings = OptimizerSpec(lr_scheduler=name, lr_scheduler_args=arguments)
    with pytest.raises(ValueError, match=f"lr_scheduler_args: {name} refuses"):
        Optimization(settings, groups(), 100)


@pytest.mark.parametrize("steps", [float("nan"), float("inf"), -1, MAX_STEPS + 1, 1e300])
def test_warm_up_steps_are_finite_and_bounded(steps):
    with pytest.raises(ValueError, match="lr_warmup_steps is .* it must be from 0 to"):
        OptimizerSpec(lr_scheduler="linear", lr_warmup_steps=steps)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": MAX_STEPS + 1},
        {"steps": 10**30},
        {"learning_rate": float("nan")},
        {"max_grad_norm": float("nan")},
        {"max_grad_norm": float("inf")},
        {"scale_weight_norms": float("nan")},
        {"guidance": float("inf")},
    ],
    ids=str,
)
def test_a_number_that_a_linked_node_gives_beyond_the_widgets_range_is_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} is .*; it must be"):
        TrainingPlan(**{"steps": 10, **changes})


def test_prodigy_with_a_rate_of_adamw_is_told_once(caplog):
    pytest.importorskip("prodigyopt")
    rehearse(spec("Prodigy"), groups(1e-4), 10)
    Optimization(spec("Prodigy"), groups(1e-4), 10)
    assert [record.message for record in caplog.records] == [
        "Prodigy multiplies the rate it finds by learning_rate, usually 1.0; here it is 0.0001"
    ]
