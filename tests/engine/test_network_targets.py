"""Target selection against musubi-tuner's own choices, and where it differs on purpose."""

import json
from pathlib import Path

import pytest
from torch import nn

from comfyui_braid.engine.network.architectures import DEFAULT, architecture_of
from comfyui_braid.engine.network.layers import LayerShape
from comfyui_braid.engine.network.report import report_text
from comfyui_braid.engine.network.spec import NetworkSpec, TargetPatterns, parse_network_args
from comfyui_braid.engine.network.targets import parameter_count, select_targets

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "network_targets.json").read_text())
DETECTED = {
    "hunyuan_video": {"image_model": "hunyuan_video", "vec_in_dim": 768},
    "wan21_t2v_1.3B": {"image_model": "wan2.1"},
    "flux_kontext": {"image_model": "flux"},
    "qwen_image": {"image_model": "qwen_image"},
    "z_image": {"image_model": "lumina2", "dim": 3840},
}
CASES = [
    pytest.param(name, case, id=f"{name}-{' '.join(case['network_args']) or 'default'}")
    for name, golden in GOLDEN["architectures"].items()
    for case in golden["cases"]
]
MODULATION = ("img_mod", "txt_mod", "modulation")


def skeleton(names) -> nn.Module:
    """A module tree in which every dotted name is a Linear 4 → 4."""
    root = nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(leaf, nn.Linear(4, 4))
    return root


def musubi_s_choice(name, case):
    """musubi's selection, with the differences that are on purpose taken out of it."""
    selected = case["selected"]
    included = "include_patterns" in " ".join(case["network_args"])
    if name == "qwen_image" and not included:
        # its default exclude is misspelt and matches nothing, so it trains the modulation
        return [n for n in selected if not any(word in n for word in MODULATION)]
    if name == "qwen_image" and "img_mod" in str(case["network_args"]):
        return [n for n in selected if "txt_mod" not in n]  # img_mod is taken back by include
    if name == "flux_kontext" and not included:
        # there any exclude_patterns switch the default exclude off
        return [n for n in selected if not any(word in n for word in MODULATION)]
    return selected


@pytest.mark.parametrize("name, case", CASES)
def test_the_layers_are_those_of_musubi_or_differ_on_purpose(name, case):
    model = skeleton(GOLDEN["architectures"][name]["candidates_linear_conv"])
    tokens = "\n".join(case["network_args"])
    if "(unclosed" in tokens:  # musubi logs an error and trains everything
        with pytest.raises(ValueError, match="not a regular expression"):
            parse_network_args(tokens)
        return
    spec = parse_network_args(tokens)
    if case["num_selected"] == 0:  # musubi fails much later with "No LoRA modules found"
        with pytest.raises(ValueError, match="no layer to adapt"):
            select_targets(model, spec, architecture_of(DETECTED[name]))
        return
    report = select_targets(model, spec, architecture_of(DETECTED[name]))
    assert [c.name for c in report.selected] == musubi_s_choice(name, case)


FLUX = [
    f"double_blocks.{i}.{layer}"
    for i in range(12)
    for layer in ("img_mod.lin", "img_attn.qkv", "img_attn.proj")
]


def select(include=(), exclude=(), mode="musubi", architecture=None, **spec):
    return select_targets(
        skeleton(["img_in", *FLUX]),
        NetworkSpec(targets=TargetPatterns(include=include, exclude=exclude, mode=mode), **spec),
        architecture or architecture_of({"image_model": "flux"}),
    )


def test_every_candidate_says_why():
    reasons = {c.name: c.reason for c in select(exclude=(r".*proj",)).candidates}
    assert reasons["img_in"] == "outside the blocks"
    assert reasons["double_blocks.0.img_attn.qkv"] == "in the blocks"
    assert reasons["double_blocks.0.img_attn.proj"] == "exclude_patterns '.*proj'"
    assert reasons["double_blocks.0.img_mod.lin"].startswith("default exclude")
    taken_back = select(include=(r".*img_mod.*",)).candidates[1]
    assert taken_back.selected and "takes it back from default exclude" in taken_back.reason


def test_user_excludes_are_added_to_the_defaults_and_never_replace_them():
    assert not [c for c in select(exclude=(".*qkv",)).selected if "img_mod" in c.name]


def test_a_pattern_must_match_the_whole_name_and_the_warning_says_so():
    report = select(exclude=("img_attn",))
    assert len(report.selected) == 24
    assert report.warnings == (
        "exclude_patterns: 'img_attn' matches no layer; a pattern must match the whole name: "
        "'.*img_attn.*' would match 24",
    )
    assert select(exclude=("attn_img",)).warnings == (
        "exclude_patterns: 'attn_img' matches no layer; no layer name contains it",
    )


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ("network_type=loha loraplus_lr_ratio=4", "loraplus_lr_ratio=4.0 has no effect on a loha"),
        ("factor=8", "factor=8 has no effect on a lora: it is of lokr"),
        ("conv_alpha=2", "conv_alpha=2.0 has no effect without conv_dim"),
    ],
)
def test_a_setting_that_does_nothing_is_a_warning(settings, sentence):
    report = select_targets(skeleton(FLUX), parse_network_args(settings), DEFAULT)
    (warning,) = report.warnings
    assert warning.startswith(sentence)
    assert f"warning: {warning}" in report_text(report)
    used = "network_type=lokr factor=8 conv_dim=4 conv_alpha=2"
    assert not select_targets(skeleton(FLUX), parse_network_args(used), DEFAULT).warnings


def test_counts_are_given_for_every_pattern():
    report = select(exclude=(r".*\.\d{2}\..*",), include=(r".*\.10\.img_attn\.qkv",))
    assert [(c.origin, c.matches) for c in report.patterns] == [
        ("default exclude", 12),
        ("exclude_patterns", 6),
        ("include_patterns", 1),
    ]
    assert len(report.selected) == 20 + 1


def test_include_alone_adds_nothing_in_musubi_mode_and_is_everything_in_whitelist_mode():
    assert len(select(include=(r".*qkv",)).selected) == 24
    whitelist = select(include=(r".*qkv", "img_in"), exclude=(r".*\.1\d\..*",), mode="whitelist")
    assert [c.name for c in whitelist.selected] == [
        "img_in",
        *(f"double_blocks.{i}.img_attn.qkv" for i in range(10)),
    ]
    modulation = select(include=(r".*img_mod.*",), mode="whitelist")
    assert len(modulation.selected) == 12


def test_nothing_selected_is_an_error_with_the_near_misses():
    with pytest.raises(ValueError) as error:
        select(include=("qkv",), mode="whitelist")
    assert "no layer to adapt" in str(error.value)
    assert "'.*qkv.*' would match 12" in str(error.value)
    with pytest.raises(ValueError, match="add include_patterns"):
        select(exclude=(".*",))
    with pytest.raises(ValueError, match="taken for FLUX.1, has no Linear"):
        select_targets(
            skeleton(["img_in"]), NetworkSpec(), architecture_of({"image_model": "flux"})
        )


class Convolutions(nn.Module):
    """A block of musubi's toy model, and two convolutions that cannot be adapted."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.conv = nn.Conv2d(4, 4, 3)
        self.c1 = nn.Conv2d(4, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")


def toy_model():
    root = nn.Module()
    root.blocks = nn.ModuleList([Convolutions(), Convolutions()])
    root.out = nn.Linear(8, 4)
    return root


@pytest.mark.parametrize("case", GOLDEN["toy_model"]["cases"][:4], ids=lambda c: c["case"])
def test_ranks_and_alphas_are_those_of_musubi_s_toy_model(case):
    text, widgets = {
        "defaults dim None alpha None": ("", {"network_dim": 4, "network_alpha": 1.0}),
        "conv_dim=2": ("conv_dim=2", {"network_dim": 4, "network_alpha": 1.0}),
        "conv_dim=2 conv_alpha=3": (
            "conv_dim=2 conv_alpha=3",
            {"network_dim": 4, "network_alpha": 8.0},
        ),
        "alpha 0": ("", {"network_dim": 4, "network_alpha": 0.0}),
    }[case["case"]]
    spec = parse_network_args(text, **widgets)
    report = select_targets(toy_model(), spec, DEFAULT)
    ours = [
        (
            "lora_unet_" + c.name.replace(".", "_"),
            *spec.rank_and_alpha(large_kernel=c.shape.has_large_kernel),
        )
        for c in report.selected
    ]
    assert ours == [(name, rank, alpha) for name, rank, alpha, *_ in case["modules"]]


def test_convolutions_that_do_not_fit_are_skipped_with_the_reason():
    reasons = {
        c.name: c.reason for c in select_targets(toy_model(), NetworkSpec(), DEFAULT).candidates
    }
    assert reasons["blocks.0.depthwise"] == "convolution in 4 groups"
    assert reasons["blocks.0.mirrored"] == "convolution with reflect padding"
    assert "set conv_dim" in reasons["blocks.0.conv"]


@pytest.mark.parametrize("name", ["hunyuan_video", "wan21_t2v_1.3B", "flux_kontext", "z_image"])
def test_parameters_at_full_depth_are_musubi_s(name):
    """Counted from musubi's figures: modules and rank-4 parameters of the real sizes."""
    golden = GOLDEN["architectures"][name]
    layers = {
        "hunyuan_video": _hunyuan(),
        "wan21_t2v_1.3B": _wan(),
        "flux_kontext": _flux(),
        "z_image": _z_image(),
    }[name]
    spec = NetworkSpec(rank=4, alpha=1.0)
    shapes = [LayerShape(in_features=i, out_features=o) for i, o in layers]
    assert len(shapes) == golden["full_depth_num_modules_default"]
    total = sum(parameter_count(shape, spec) for shape in shapes)
    assert total == golden["full_depth_trainable_params_rank4"]


def _hunyuan(h=3072):
    double = [(h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)] * 2
    return double * 20 + [(h, 7 * h), (5 * h, h)] * 40


def _flux(h=3072):
    double = [(h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)] * 2
    return double * 19 + [(h, 7 * h), (5 * h, h)] * 38


def _wan(h=1536, ffn=8960):
    return ([(h, h)] * 8 + [(h, ffn), (ffn, h)]) * 30


def _z_image(h=3840, ffn=10240):
    return ([(h, h)] * 4 + [(h, ffn), (ffn, h), (h, ffn)]) * 30


def test_verbose_logs_every_layer_with_the_reason(caplog):
    with caplog.at_level("INFO", logger="comfyui_braid.network"):
        select(exclude=(".*proj",), verbose=True)
    assert len(caplog.messages) == 37
    assert "skipped double_blocks.0.img_attn.proj: exclude_patterns '.*proj'" in caplog.messages
    caplog.clear()
    with caplog.at_level("INFO", logger="comfyui_braid.network"):
        select()
    assert not caplog.messages


def test_the_report_names_layers_reasons_patterns_and_size():
    text = report_text(select(exclude=("proj", r".*\.11\..*"), rank=4, alpha=2.0))
    assert "FLUX.1: LoRA, rank 4, alpha 2" in text
    assert "22 of 37 layers adapted, 704 parameters" in text
    assert "double_blocks.0-10.img_attn.qkv" in text and "11 × Linear 4 → 4" in text
    assert "warning: exclude_patterns: 'proj' matches no layer" in text
    assert "skipped, 12 × default exclude" in text
    assert "skipped, 1 × outside the blocks" in text
