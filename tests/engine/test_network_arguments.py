"""musubi's key=value options as people type and paste them."""

import json
from pathlib import Path

import pytest

from comfyui_braid.engine.arguments import (
    parse_arguments,
    parse_bool,
    parse_float,
    parse_int,
    parse_literal,
    refuse_unknown,
)

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "network_targets.json").read_text())


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("", {}),
        ("conv_dim=4", {"conv_dim": "4"}),
        ("conv_dim=4 conv_alpha=2", {"conv_dim": "4", "conv_alpha": "2"}),
        ("conv_dim=4\nconv_alpha = 2\n", {"conv_dim": "4", "conv_alpha": "2"}),
        ("conv_dim=4, conv_alpha=2", {"conv_dim": "4", "conv_alpha": "2"}),
        ("# a comment\nconv_dim=4", {"conv_dim": "4"}),
        ("a=", {"a": ""}),
        # a value may hold blanks inside brackets, and further equal signs
        (
            "exclude_patterns=[r'.*a.*', r'.*(?=b).*']\nverbose=True",
            {"exclude_patterns": "[r'.*a.*', r'.*(?=b).*']", "verbose": "True"},
        ),
        # as on musubi's command line
        (
            r'''--network_args "exclude_patterns=[r'.*\.\d{2}\..*']" "loraplus_lr_ratio=4"''',
            {"exclude_patterns": r"[r'.*\.\d{2}\..*']", "loraplus_lr_ratio": "4"},
        ),
        # … and the two ways in which a shell writes ' inside '…'
        (
            r"""'a=[r'"'"'.*x y'"'"']' 'b=[r'\''.*z'\'']' c=4""",
            {"a": "[r'.*x y']", "b": "[r'.*z']", "c": "4"},
        ),
        ("'a=1' \\\n  'b=x y'", {"a": "1", "b": "x y"}),
        ('a="1 2" b=3', {"a": "1 2", "b": "3"}),
        # as in its TOML file
        (
            'network_args = [ "loraplus_lr_ratio=4",\n  \'exclude_patterns=[r".*x.*"]\', ]',
            {"loraplus_lr_ratio": "4", "exclude_patterns": '[r".*x.*"]'},
        ),
        (r'optimizer_args = ["betas=(0.9, 0.99)"]', {"betas": "(0.9, 0.99)"}),
        ("betas=(0.9, 0.99) weight_decay=0.01", {"betas": "(0.9, 0.99)", "weight_decay": "0.01"}),
        # a bracket that is escaped in an unquoted regex opens nothing
        (r"include_patterns=.*\[x b=1", {"include_patterns": r".*\[x", "b": "1"}),
    ],
)
def test_tokens_are_read_in_every_layout(text, parsed):
    assert parse_arguments(text) == parsed


@pytest.mark.parametrize("case", GOLDEN["key_value_split"]["cases"])
def test_musubi_s_tokens_are_read_and_its_failures_are_either_read_or_explained(case):
    """musubi refuses a second `=` and keeps outer blanks; here the first splits, and blanks go."""
    text = "\n".join(case["network_args"])
    if case["network_args"] == ["novalue"]:
        with pytest.raises(ValueError, match="'novalue' is not key=value"):
            parse_arguments(text)
    elif "error" in case:
        assert parse_arguments(text) == {"exclude_patterns": "[r'a=b']"}
    else:
        expected = {key.strip(): value.strip() for key, value in case["parsed"].items()}
        assert parse_arguments(text) == expected


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a=1 a=2", "network_args: a is given twice"),
        ("=1", "is not key=value"),
        ("a b=1", "'a' is not key=value"),
        ('"a=1', "never closes"),
        ("a=[r'x]", "never closes"),
        ("a=[1, 2", r"misses its '\]'"),
        ("['a=1'", "does not end with"),
    ],
)
def test_broken_tokens_are_refused_with_the_reason(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_arguments(text)


def test_an_unknown_key_is_refused_with_the_closest_and_all_known_ones():
    with pytest.raises(ValueError) as error:
        refuse_unknown("network_args", {"conv_dims": "4"}, ["conv_dim", "conv_alpha"])
    assert str(error.value) == (
        "network_args: unknown key 'conv_dims' (did you mean conv_dim?); "
        "known keys: conv_alpha, conv_dim"
    )


def test_literals_are_data_and_never_code():
    assert parse_literal("betas", "(0.9, 0.99)") == (0.9, 0.99)
    assert parse_literal("x", r"['\d']") == [r"\d"]
    for code in ("__import__('os')", "1+", "open('x')", "lambda: 0"):
        with pytest.raises(ValueError, match="x=.*not a Python literal"):
            parse_literal("x", code)


def test_numbers_name_key_value_and_what_is_allowed():
    assert parse_float("p", "1e-3") == 1e-3
    assert parse_int("n", "8") == parse_int("n", "8.0") == 8
    assert parse_bool("v", "True") is parse_bool("v", "1") is True
    assert parse_bool("v", "false") is False
    with pytest.raises(ValueError, match="n=8.5: not a whole number such as 8"):
        parse_int("n", "8.5")
    for bad in ("x", "", "nan", "inf"):
        with pytest.raises(ValueError, match="p=.*: not a number such as 0.1"):
            parse_float("p", bad)
    with pytest.raises(ValueError, match="v=yes: not True or False"):
        parse_bool("v", "yes")


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 1_000_000,
        "a" * 1_000_000,
        "\n" * 49_000 + "#",
        "a" * 49_000 + "=1",
        "a=" + "[" * 49_000,
        "a=" + "(" * 24_000 + ")" * 24_000,
        'a="' + '\\"' * 24_000,
        "'" * 49_999,
        "a " * 24_000,
        "a = " * 12_000,
        "_args " * 8_000,
    ],
    ids=lambda text: f"{text[:6]!r} and so on",
)
def test_a_text_that_nobody_types_is_read_at_once_or_refused_in_one_short_sentence(text):
    try:
        refuse_unknown("network_args", parse_arguments(text), ["conv_dim"])
    except ValueError as refusal:
        assert len(str(refusal)) < 300 and "\n" not in str(refusal)


@pytest.mark.parametrize(
    "value",
    [
        "[" * 1_000_000,
        "[" * 49_000,
        "-" * 49_000 + "1",
        "1+" * 24_000 + "1",
        "9" * 49_000,
        "{" * 49_000,
        "a." * 24_000 + "b",
        "f(" * 24_000,
        "not " * 12_000 + "1",
        "lambda:" * 7_000 + "1",
        "'\ud800'",
        "a\0b",
        "{[]: 1}",
        "{**{}}",
        "1 if 1 else " * 4_000 + "1",
    ],
    ids=lambda value: ascii(value[:12]),
)
def test_a_literal_that_python_cannot_read_is_refused_in_one_short_sentence(value):
    with pytest.raises(ValueError, match="^x[= ]") as refusal:
        parse_literal("x", value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("value", ["1e300", "9" * 400, "-" + "9" * 40, "1e16"])
def test_a_whole_number_that_no_setting_could_hold_is_refused(value):
    with pytest.raises(ValueError, match="^n=.*: not a whole number such as 8$"):
        parse_int("n", value)
