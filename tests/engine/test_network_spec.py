"""NetworkSpec from widgets and network_args."""

import pytest

from comfyui_braid.engine.network.spec import (
    NetworkSpec,
    TargetPatterns,
    network_args_of,
    parse_network_args,
    parse_patterns,
)


def test_widgets_alone_make_the_spec():
    spec = parse_network_args("", network_dim=8, network_alpha=4.0, exclude_patterns=".*a.*\n.*b.*")
    assert spec == NetworkSpec(
        rank=8, alpha=4.0, targets=TargetPatterns(exclude=(".*a.*", ".*b.*"))
    )


def test_a_key_in_network_args_wins_over_its_widget():
    text = "network_dim=32 loraplus_lr_ratio=4 exclude_patterns=[r'.*x.*'] network_type=lokr"
    spec = parse_network_args(text, network_dim=8, exclude_patterns=".*y.*", network_type="loha")
    assert (spec.rank, spec.loraplus_lr_ratio, spec.kind) == (32, 4.0, "lokr")
    assert spec.targets.exclude == (".*x.*",)


def test_alpha_zero_is_the_rank_and_convolutions_have_their_own():
    spec = parse_network_args("conv_dim=2 conv_alpha=3", network_dim=4, network_alpha=0.0)
    assert spec.rank_and_alpha(large_kernel=False) == (4, 4.0)
    assert spec.rank_and_alpha(large_kernel=True) == (2, 3.0)


def test_conv_alpha_is_1_when_only_conv_dim_is_given_as_in_musubi():
    assert parse_network_args("conv_dim=2").rank_and_alpha(large_kernel=True) == (2, 1.0)


def test_loraplus_zero_on_the_widget_is_off_and_in_the_text_refused():
    assert parse_network_args("", loraplus_lr_ratio=0.0).loraplus_lr_ratio is None
    for ratio in ("0", "-1"):
        with pytest.raises(ValueError, match=f"loraplus_lr_ratio={float(ratio)}: must be above 0"):
            parse_network_args(f"loraplus_lr_ratio={ratio}")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("conv_dims=4", "did you mean conv_dim"),
        ("rank_dropout=x", "rank_dropout=x: not a number"),
        ("rank_dropout=1", "rank_dropout=1.0: must be from 0 to below 1"),
        ("network_dim=0", "network_dim=0: must be 1 or more"),
        ("network_alpha=-1", "network_alpha=-1.0: must be 0"),
        ("conv_dim=0", "conv_dim=0: must be 1 or more"),
        ("network_type=dora", "network_type=dora: must be one of lora, loha, lokr"),
        ("target_mode=all", "target_mode=all: must be one of musubi, whitelist"),
        ("target_mode=whitelist", "target_mode whitelist adapts only what include_patterns match"),
        ("exclude_patterns=[r'(unclosed']", r"exclude_patterns: '\(unclosed' is not a regular exp"),
        ("include_patterns=[r'a', 3]", "include_patterns=.*not one regular expression a line"),
        ("factor=0", "factor=0: must be -1"),
        ("factor=1e300", r"factor=1e\+300: must be -1"),
        ("network_alpha=1e308", r"network_alpha=1e\+308: must be 0 .* up to 1000000"),
        ("network_alpha=nan", "network_alpha=nan: not a number"),
        ("conv_alpha=1e7", "conv_alpha=10000000.0: must be 0"),
        ("network_dim=1e308", r"network_dim=1e\+308: must be 1 or more, up to 4096"),
        ("conv_dim=4097", "conv_dim=4097: must be 1 or more, up to 4096"),
        ("loraplus_lr_ratio=1e300", r"loraplus_lr_ratio=1e\+300: must be above 0 and up to 10000"),
        ("rank_dropout=-1e-9", "rank_dropout=-1e-09: must be from 0 to below 1"),
        ("module_dropout=1e999", "module_dropout=1e999: not a number"),
        ("verbose=yes", "verbose=yes: not True or False"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_network_args(text)


@pytest.mark.parametrize(
    "text, patterns",
    [
        ("", ()),
        ("[]", ()),
        (".*single_blocks.*", (".*single_blocks.*",)),
        ("\n .*a.* \n\n.*b.*\n", (".*a.*", ".*b.*")),
        ("[r'.*a.*', r'.*b.*']", (".*a.*", ".*b.*")),
        ("[ r'.*a.*',\n  '.*b.*', ]", (".*a.*", ".*b.*")),
        ("(r'.*a.*', r'.*b.*')", (".*a.*", ".*b.*")),  # musubi: AttributeError
        ("r'.*a.*'\nr'.*b.*',", (".*a.*", ".*b.*")),
        (r"[r'.*\.\d{2}\..*']", (r".*\.\d{2}\..*",)),
        (r"['.*\.\d{2}\..*']", (r".*\.\d{2}\..*",)),
        ("[0-9]+.*", ("[0-9]+.*",)),  # a regular expression, not a list
        ("(img|txt)_attn.*", ("(img|txt)_attn.*",)),
    ],
)
def test_patterns_are_lines_or_musubi_s_list(text, patterns):
    assert parse_patterns("exclude_patterns", text) == patterns


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec(),
        NetworkSpec(rank=4, alpha=1.0, conv_rank=2, conv_alpha=3.0, verbose=True),
        NetworkSpec(kind="lokr", lokr_factor=8, module_dropout=0.25, neuron_dropout=0.5),
        NetworkSpec(kind="lokr", rank_dropout=0.25),
        NetworkSpec(rank_dropout=0.1, loraplus_lr_ratio=16.0),
        NetworkSpec(targets=TargetPatterns(exclude=(r".*\.\d{2}\..*", "it's=x"), include=("a b",))),
        NetworkSpec(targets=TargetPatterns(include=(".*",), mode="whitelist")),
    ],
)
def test_a_spec_survives_its_text_form(spec):
    text = "\n".join(f"{key}={value}" for key, value in network_args_of(spec).items())
    again = parse_network_args(
        text,
        network_type=spec.kind,
        network_dim=spec.rank,
        network_alpha=spec.alpha,
        network_dropout=spec.neuron_dropout,
    )
    assert again == spec
