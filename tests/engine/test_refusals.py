"""One sentence for each shape of refusal, however large what was typed."""

import math

import pytest

from comfyui_braid.engine.refusals import (
    did_you_mean,
    refuse_below,
    refuse_long,
    refuse_not_finite,
    refuse_not_positive,
    refuse_other,
    refuse_outside,
    said,
)

SORTS = ("step", "mtime", "given")


@pytest.mark.parametrize(
    "refuse, sentence",
    [
        (lambda: refuse_other("sort", "stpe", SORTS), "sort is 'stpe' (did you mean step?); "
         "choose one of step, mtime, given"),
        (lambda: refuse_other("sort", "", SORTS), "sort is ''; choose one of step, mtime, given"),
        (lambda: refuse_below("steps", 0, 1), "steps is 0; it must be 1 or more"),
        (lambda: refuse_below("norm", -1.0, 0, "off"), "norm is -1.0; it must be 0 (off) or more"),
        (lambda: refuse_below("norm", math.nan, 0), "norm is nan; it must be a finite number"),
        (lambda: refuse_below("norm", math.inf, 0), "norm is inf; it must be a finite number"),
        (lambda: refuse_not_finite("mean", -math.inf), "mean is -inf; it must be a finite number"),
        (lambda: refuse_not_positive("std", 0.0), "std is 0.0; it must be a number above 0"),
        (lambda: refuse_not_positive("std", math.nan), "std is nan; it must be a finite number"),
        (lambda: refuse_outside("beta", 1.5, 0, 1, "0.95 is usual"), "beta is 1.5; it must be "
         "between 0 and 1; 0.95 is usual"),
        (lambda: refuse_outside("beta", math.nan, 0, 1), "beta is nan; it must be between 0 and 1"),
        (lambda: refuse_long("text", "x" * 50_001), "text holds 50,001 characters; at most 50,000 "
         "are read"),
    ],
)  # fmt: skip
def test_each_says_what_was_given_and_what_is_allowed(refuse, sentence):
    with pytest.raises(ValueError) as refusal:
        refuse()
    assert str(refusal.value) == sentence


def test_what_is_allowed_passes():
    refuse_other("sort", "step", SORTS)
    refuse_below("steps", 1, 1)
    refuse_below("seed", 10**400, 0)  # an int is finite, and no float
    refuse_not_positive("std", 1e-300)
    refuse_outside("beta", 1, 0, 1)
    refuse_long("text", "x" * 50_000)


def test_a_megabyte_is_compared_and_repeated_only_in_part():
    with pytest.raises(ValueError) as refusal:
        refuse_other("sort", "step" * 250_000, SORTS)
    assert len(str(refusal.value)) < 200
    assert did_you_mean("x" * 1_000_000, ["x" * 100, *SORTS])


@pytest.mark.parametrize(
    "error, sentence",
    [
        (ValueError("Invalid beta: 2."), "Invalid beta: 2"),
        (TypeError("bad operand 'NoneType'"), "it needs a value of another kind: bad operand "
         "'None'"),
        (KeyError("step"), "something is missing: 'step'"),
        (AssertionError(), "a check of its own fails"),
        (RuntimeError(), "it does not say why"),
        (RuntimeError("TypeError: a <class 'float'>\nand <a.B object at 0x7f3>"), "a float and "
         "<a.B>"),
        (OSError(13, "Permission denied", "/secret"), "Permission denied"),
        (RuntimeError("x" * 5000), "x" * 300 + " …"),
    ],
)  # fmt: skip
def test_errors_of_others_are_said_without_pythons_words(error, sentence):
    assert said(error) == sentence
