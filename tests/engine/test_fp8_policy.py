import pytest

from comfyui_braid.engine.fp8.policy import Fp8Policy, LayerPatterns

NAMES = {
    "flux": ["double_blocks.0.img_attn.qkv", "single_blocks.3.linear1"],
    "wan2.1": ["blocks.0.self_attn.q", "blocks.1.ffn.2", "vace_blocks.0.ffn.0"],
    "qwen_image": ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.img_mod.1"],
    "hunyuan_video": ["double_blocks.0.txt_mlp.2", "single_blocks.0.linear2"],
    "lumina2": ["layers.0.attention.qkv", "noise_refiner.0.feed_forward.w1"],
    "something new": ["model.layers.3.mlp.up", "down_blocks.1.ff.net.0.proj"],
}
KEPT = {
    "flux": ["double_blocks.0.img_mod.lin", "single_blocks.0.modulation.lin", "img_in"],
    "wan2.1": ["time_embedding.0", "head.head", "text_embedding.2", "img_emb.proj.1"],
    "qwen_image": ["time_text_embed.timestep_embedder.linear_1", "norm_out.linear", "proj_out"],
    "hunyuan_video": [
        "txt_in.individual_token_refiner.blocks.0.mlp.0",
        "double_blocks.0.img_mod.lin",
    ],
    "lumina2": ["layers.0.adaLN_modulation.1", "x_embedder", "final_layer.linear"],
    "something new": ["layers.0.adaLN_modulation.1", "blocks.0.norm1.linear", "proj_out"],
}


@pytest.mark.parametrize(
    ("architecture", "name"), [(a, n) for a, names in NAMES.items() for n in names]
)
def test_the_preset_quantises_the_layers_of_the_blocks(architecture, name):
    decision = Fp8Policy().decide([name], architecture)[name]
    assert decision.quantize and "preset" in decision.reason


@pytest.mark.parametrize(
    ("architecture", "name"), [(a, n) for a, names in KEPT.items() for n in names]
)
def test_the_preset_keeps_modulation_embeddings_and_heads(architecture, name):
    decision = Fp8Policy().decide([name], architecture)[name]
    assert not decision.quantize and "preset" in decision.reason


def test_an_include_pattern_admits_what_the_preset_keeps_and_an_exclude_pattern_wins():
    patterns = LayerPatterns(include=(r"img_mod",), exclude=(r"^double_blocks\.1\.",))
    admitted, in_the_preset, excluded, kept = (
        "double_blocks.0.img_mod.lin",
        "double_blocks.0.txt_attn.qkv",
        "double_blocks.1.img_mod.lin",
        "double_blocks.0.txt_mod.lin",
    )
    names = [admitted, in_the_preset, excluded, kept]
    decided = Fp8Policy(patterns=patterns).decide(names, "flux")
    assert [name for name in names if decided[name].quantize] == [admitted, in_the_preset]
    assert decided[excluded].reason == r"your exclude pattern '^double_blocks\\.1\\.'"
    assert decided[kept].reason == r"flux preset keeps '_mod\\.lin$'"


MODULATION = [
    ("flux", "double_blocks.0.img_mod.lin"),
    ("flux", "single_blocks.0.modulation.lin"),
    ("hunyuan_video", "double_blocks.0.img_mod.lin"),
    ("lumina2", "layers.0.adaLN_modulation.1"),
    ("ideogram4", "layers.0.adaln_modulation"),
    ("something new", "layers.0.adaLN_modulation.1"),
]


@pytest.mark.parametrize(("architecture", "name"), MODULATION)
def test_modulation_fp8_quantises_the_modulation_layers_that_the_preset_keeps(architecture, name):
    assert not Fp8Policy().decide([name], architecture)[name].quantize
    chosen = Fp8Policy(modulation="fp8").decide([name], architecture)[name]
    assert chosen.quantize and chosen.reason == "modulation in fp8"
    mine = Fp8Policy(modulation="fp8", patterns=LayerPatterns(exclude=(r"(?i)mod",)))
    assert not mine.decide([name], architecture)[name].quantize


@pytest.mark.parametrize(
    ("architecture", "name"),
    [(a, n) for a, names in KEPT.items() for n in names if (a, n) not in MODULATION],
)
def test_modulation_fp8_changes_no_other_decision(architecture, name):
    for modulation in ("keep", "fp8"):
        assert not Fp8Policy(modulation=modulation).decide([name], architecture)[name].quantize
    for others in NAMES[architecture]:
        with_it = Fp8Policy(modulation="fp8").decide([others], architecture)
        assert with_it == Fp8Policy().decide([others], architecture)


def test_a_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(ValueError, match=r"exclude_patterns: '\(' is not a regular expression"):
        Fp8Policy(patterns=LayerPatterns(exclude=("(",)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fp8_format", "e3m4"),
        ("granularity", "row"),
        ("scale_search", "max"),
        ("scale_rounding", "up"),
        ("modulation", "int8"),
        ("block_size", 63),
    ],
)
def test_an_unknown_setting_is_refused_and_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        Fp8Policy(**{field: value})


def test_a_width_that_no_block_divides_falls_back_to_channels():
    assert Fp8Policy(block_size=64).group_size(96) == 96
    assert Fp8Policy(block_size=64).group_size(128) == 64
    assert Fp8Policy(granularity="tensor").group_size(128) is None
