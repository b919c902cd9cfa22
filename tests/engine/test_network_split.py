"""split_qkv: the adapter of a fused layer is one for each of q, k and v, and files say the same."""

import json

import pytest
import torch
from network_files import FLUX, Z_IMAGE, Model, linear, network_for
from torch import nn

from comfyui_braid.engine.ema.merge import merged_tensors, prepare_merge
from comfyui_braid.engine.ema.shadows import Shadows
from comfyui_braid.engine.files import mapped_tensors
from comfyui_braid.engine.network.adapter_file import (
    as_filed,
    live_tensors,
    load_weights,
    read_adapter,
    state_dict_of,
    write_adapter,
)
from comfyui_braid.engine.network.adapters import LoRA, SplitLoRA
from comfyui_braid.engine.network.architectures import (
    ARCHITECTURES,
    DEFAULT,
    architecture_named,
)
from comfyui_braid.engine.network.attach import (
    build_adapter,
    parameter_groups,
    scale_weight_norms,
)
from comfyui_braid.engine.network.keys import KEY_FORMATS, converted
from comfyui_braid.engine.network.layers import layer_shapes
from comfyui_braid.engine.network.metadata import network_metadata
from comfyui_braid.engine.network.report import report_text
from comfyui_braid.engine.network.spec import (
    NetworkSpec,
    TargetPatterns,
    network_args_of,
    parse_network_args,
)
from comfyui_braid.engine.network.targets import select_targets
from comfyui_braid.engine.network.weights import parts_of

QKV = "double_blocks.0.img_attn.qkv"
LINEAR1 = "single_blocks.0.linear1"  # 8 → 8 + 8 + 8 + 32
ROWS = (8, 4, 4)


@pytest.fixture
def network():
    return network_for(Model(), FLUX, split_qkv=True)


def split_adapter(**spec) -> SplitLoRA:
    spec = NetworkSpec(**{"rank": 2, "alpha": 3.0, "split_qkv": True} | spec)
    built = build_adapter(linear(16, 8), spec, ROWS)
    generator = torch.Generator().manual_seed(0)
    built.reset_parameters(generator)
    with torch.no_grad():
        built.up.copy_(torch.randn(built.up.shape, generator=generator))
    return built


def apart(split: SplitLoRA) -> list[LoRA]:
    """Plain LoRAs with the same weights, one for each part."""
    plain = []
    for up, down in split.pairs():
        parameters = {"down": down.detach().clone(), "up": up.detach().clone()}
        shape = linear(up.shape[0], split.shape.in_features)
        plain.append(LoRA(shape, parameters, alpha=split.alpha, rank=split.rank))
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_it_computes_and_learns_as_one_lora_for_each_part(dtype, compute):
    split = split_adapter()
    plain = apart(split)
    for adapter in (split, *plain):
        adapter.compute_dtype = compute
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 8, generator=generator).to(dtype)
    base = torch.randn(3, 5, 16, generator=generator).to(dtype)
    target = torch.randn(3, 5, 16, generator=generator)
    ours = split.add_to(base, x)
    parts = [a.add_to(rows, x) for a, rows in zip(plain, base.split(ROWS, -1), strict=True)]
    theirs = torch.cat(parts, -1)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(split.delta(x), torch.cat([a.delta(x) for a in plain], -1))
    for output in (ours, theirs):
        (output.float() - target).square().sum().backward()
    torch.testing.assert_close(split.up.grad, torch.cat([a.up.grad for a in plain]))
    torch.testing.assert_close(split.down.grad, torch.cat([a.down.grad for a in plain]))


def test_its_delta_weight_is_theirs_and_no_rank_of_q_reaches_k_or_v():
    split = split_adapter()
    expected = torch.cat([adapter.delta_weight() for adapter in apart(split)])
    torch.testing.assert_close(split.delta_weight(), expected)
    with torch.no_grad():
        split.down[:2] = 0
    assert not split.delta_weight()[:8].any()
    assert torch.equal(split.delta_weight()[8:], expected[8:])


def test_a_fresh_one_changes_nothing_and_starts_as_its_parts_would():
    built = build_adapter(linear(16, 8), NetworkSpec(rank=64, split_qkv=True), ROWS)
    built.reset_parameters(torch.Generator().manual_seed(0))
    assert not built.delta_weight().any()
    assert (built.down.shape, built.up.shape) == ((192, 8), (16, 64))
    assert 0.99 < built.down.abs().max() * 8**0.5 <= 1  # ±1/√fan_in, as every part's


def test_rank_dropout_drops_each_part_s_ranks_apart_and_module_dropout_all_of_it():
    split = split_adapter(rank=1, alpha=1.0, rank_dropout=0.5).train()
    x = torch.randn(400, 3, 8)
    full = split.eval().delta(x)
    dropped = split.train().delta(x) / full  # 0 or 1 / (1 - p)
    kept = torch.stack([part[:, 0, 0] for part in dropped.split(ROWS, -1)]) > 1
    assert ((dropped - 2).abs() < 1e-3).logical_or(dropped.abs() < 1e-3).all()
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])
    assert 0.4 < kept.float().mean() < 0.6
    skipping = split_adapter(module_dropout=1.0).train()
    base = torch.zeros(400, 3, 16)
    assert torch.equal(skipping.add_to(base, x), base)


@pytest.mark.parametrize("key_format", KEY_FORMATS)
def test_a_file_in_every_format_is_read_back_into_the_same_network(network, key_format):
    state = state_dict_of(network, FLUX, key_format)
    again = network_for(Model(), FLUX, split_qkv=True)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    load_weights(again, read_adapter(state, layer_shapes(Model()), FLUX))
    for (_, ours), (_, theirs) in zip(again.items(), network.items(), strict=True):
        torch.testing.assert_close(ours.delta_weight(), theirs.delta_weight())
        assert key_format == "diffusers" or ours.alpha == theirs.alpha


def test_where_the_layer_stays_one_the_file_is_block_diagonal_with_alpha_for_its_rank(network):
    state = state_dict_of(network, FLUX, "kohya")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"]
    assert (down.shape, up.shape, state[f"{stem}.alpha"].item()) == ((6, 8), (24, 6), 9.0)
    own = network.adapters[stem]
    assert torch.equal(up, torch.block_diag(*own.up.detach().split((8, 8, 8))))
    assert torch.equal(down, own.down)
    assert state["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (56, 8)


def test_musubi_s_conversion_back_to_separate_layers_gives_the_three_adapters(network):
    """convert_z_image_lora_to_comfy.py --reverse: thirds of down, diagonal of up, alpha / 3."""
    state = state_dict_of(network, FLUX, "kohya")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    downs = state[f"{stem}.lora_down.weight"].chunk(3)
    up, rank = state[f"{stem}.lora_up.weight"], 2
    for part, (plain, down) in enumerate(zip(apart(network.adapters[stem]), downs, strict=True)):
        block = up[8 * part : 8 * part + 8, rank * part : rank * part + rank]
        scale = state[f"{stem}.alpha"].item() / 3 / rank
        torch.testing.assert_close(block @ down * scale, plain.delta_weight())


def test_a_diffusers_file_has_one_lora_of_the_chosen_rank_for_each_part(network):
    state = state_dict_of(network, FLUX, "diffusers")
    (q_up, q_down), *_ = network.adapters["lora_unet_double_blocks_0_img_attn_qkv"].pairs()
    stem = "transformer.transformer_blocks.0.attn."
    fold = (3 / 2) ** 0.5
    torch.testing.assert_close(state[stem + "to_q.lora_A.weight"], q_down.detach() * fold)
    torch.testing.assert_close(state[stem + "to_q.lora_B.weight"], q_up.detach() * fold)
    shapes = {k: tuple(t.shape) for k, t in state.items() if "single" in k and "lora_A" in k}
    assert set(shapes.values()) == {(2, 8)} and len(shapes) == 4
    from_file = converted(state_dict_of(network, FLUX), "diffusers", FLUX)
    assert from_file.keys() == state.keys()
    assert all(torch.equal(from_file[key], state[key]) for key in state)


def test_a_lora_that_shares_its_ranks_is_written_for_diffusers_as_before():
    state = state_dict_of(network_for(Model(), FLUX, rank=6), FLUX, "diffusers")
    downs = [state[f"transformer.transformer_blocks.0.attn.to_{p}.lora_A.weight"] for p in "qkv"]
    assert torch.equal(downs[0], downs[1]) and downs[0].shape == (6, 8)
    fresh = network_for(Model(), FLUX, rank=6)
    for adapter in fresh.in_order():
        nn.init.zeros_(adapter.up)
    state = state_dict_of(fresh, FLUX, "diffusers")
    assert state["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (6, 8)


def test_weights_that_mix_the_parts_do_not_load_into_a_split_network(network):
    shared = network_for(Model(), FLUX, rank=6)  # of the same shapes in files, but not zero beside
    weights = read_adapter(state_dict_of(shared, FLUX), layer_shapes(Model()), FLUX)
    layers = {QKV: weights[QKV]}
    only = network_for(Model(), FLUX, split_qkv=True, targets=whitelist(QKV))
    with pytest.raises(ValueError, match=r"img_attn\.qkv: .*its 3 parts; switch split_qkv off"):
        load_weights(only, layers)


def whitelist(*patterns):
    return TargetPatterns(include=patterns, mode="whitelist")


def test_averages_of_the_live_tensors_become_the_averages_of_files(network, tmp_path):
    first = state_dict_of(network, FLUX)
    shadows = Shadows(live_tensors(network), sigma_rels=(0.1,), update_every_steps=1)
    shadows.update(1)  # holds what it has seen first
    averaged = as_filed(network, {k.removeprefix("0.1/"): t for k, t in untimed(shadows)})
    matrices = {key: t for key, t in first.items() if not key.endswith(".alpha")}
    assert averaged.keys() == matrices.keys()
    assert all(torch.equal(averaged[key], tensor) for key, tensor in matrices.items())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # in place, as an optimizer does
    shadows.update(2)
    path = tmp_path / "run-shadows.safetensors"
    shadows.write(path, {}, {}, lambda tensors: as_filed(network, tensors))
    stored = mapped_tensors(path)
    up = f"0.1/diffusion_model.{QKV}.lora_up.weight"
    key = up.removeprefix("0.1/")
    assert stored[up].shape == first[key].shape
    ratio = stored[up][first[key] != 0] / first[key][first[key] != 0]
    assert 1 < ratio.min() and ratio.max() - ratio.min() < 1e-5
    assert not stored[up][first[key] == 0].any()


def untimed(shadows):
    return [(key, tensor) for key, tensor in shadows.state_dict().items() if key != "step"]


def test_loraplus_gives_the_ups_of_every_part_its_rate(network):
    spec = network_for(Model(), FLUX, split_qkv=True, loraplus_lr_ratio=4.0)
    down, up = parameter_groups(spec, 1e-3)
    assert up["lr"] == 4e-3 and len(up["params"]) == len(down["params"]) == len(spec.layer_names)
    assert {p.shape for p in up["params"]} >= {(24, 2), (56, 2)}


def test_scale_weight_norms_limits_each_part_by_itself():
    network = network_for(Model(), FLUX, split_qkv=True, targets=whitelist(QKV))
    (adapter,) = network.in_order()
    with torch.no_grad():
        adapter.up[:8] *= 100
    before = [a.delta_weight() for a in apart(adapter)]
    limit = (before[1].norm() + before[2].norm()).item()
    done = scale_weight_norms(network, limit)
    after = [a.delta_weight() for a in apart(adapter)]
    assert done.scaled == 1 and done.norms.shape == (3,)
    torch.testing.assert_close(after[0], before[0] * limit / before[0].norm())
    assert torch.equal(after[1], before[1]) and torch.equal(after[2], before[2])


def test_patterns_name_the_fused_layer_and_mean_all_of_its_parts():
    targets = TargetPatterns(exclude=(r".*\.0\.img_attn\.qkv",))
    network = network_for(Model(), FLUX, split_qkv=True, targets=targets)
    assert QKV not in network.layer_names
    assert "double_blocks.1.img_attn.qkv" in network.layer_names


def test_only_lora_is_split():
    for kind in ("loha", "lokr"):
        with pytest.raises(ValueError, match=f"split_qkv=True: works on lora only, not on {kind}"):
            parse_network_args("", network_type=kind, split_qkv=True)
    with pytest.raises(ValueError, match="split_qkv=maybe: not True or False"):
        parse_network_args("split_qkv=maybe")
    assert parse_network_args("split_qkv=False", split_qkv=True) == parse_network_args("")


def test_the_file_says_that_it_was_split_as_sd_scripts_says_it():
    spec = parse_network_args("split_qkv=True")
    assert network_args_of(spec) == {"split_qkv": "True"}
    assert json.loads(network_metadata(spec, FLUX)["ss_network_args"]) == {"split_qkv": "True"}
    assert network_args_of(NetworkSpec()) == {}


def test_the_report_counts_adapters_parameters_and_what_a_file_will_hold(network):
    model = Model()
    spec = NetworkSpec(rank=2, split_qkv=True)
    report = select_targets(model, spec, FLUX)
    assert report.parameters == sum(p.numel() for p in network.parameters())
    state = state_dict_of(network, FLUX)
    held = sum(t.numel() for key, t in state.items() if not key.endswith(".alpha"))
    assert report.filed_parameters == held > report.parameters
    text = report_text(report)
    assert "2 × Linear 8 → 24, 3 adapters" in text
    assert "1 × Linear 8 → 56, 4 adapters" in text
    assert "adapters" not in report_text(select_targets(model, NetworkSpec(), FLUX))


def test_a_model_without_fused_layers_is_a_warning():
    spec = NetworkSpec(split_qkv=True, targets=whitelist(r".*img_mlp.*"))
    (warning,) = select_targets(Model(), spec, FLUX).warnings
    assert warning == (
        "split_qkv has no effect: no adapted layer of this model, taken for FLUX.1, holds q, k and "
        "v in one weight"
    )
    with_qkv = NetworkSpec(split_qkv=True, targets=whitelist(".*"))
    assert select_targets(Model(), with_qkv, FLUX).warnings == ()


WIDE = 3072
FUSED = [
    ("flux1", "double_blocks.3.txt_attn.qkv", 3 * WIDE, WIDE, (WIDE,) * 3),
    ("flux1", "single_blocks.37.linear1", 7 * WIDE, WIDE, (WIDE, WIDE, WIDE, 4 * WIDE)),
    ("flux1", "single_blocks.37.linear2", WIDE, 5 * WIDE, ()),
    ("flux1", "double_blocks.3.img_mlp.0", 4 * WIDE, WIDE, ()),
    ("flux_2_dev", "single_blocks.2.linear1", 27 * 2048, 6144, (6144, 6144, 6144, 36864)),
    ("chroma", "single_blocks.2.linear1", 7 * WIDE, WIDE, (WIDE, WIDE, WIDE, 4 * WIDE)),
    ("hunyuan_video", "double_blocks.1.img_attn.qkv", 3 * WIDE, WIDE, (WIDE,) * 3),
    ("hunyuan_video", "single_blocks.1.linear1", 7 * WIDE, WIDE, (WIDE, WIDE, WIDE, 4 * WIDE)),
    ("hunyuan_video_1_5", "double_blocks.1.txt_attn.qkv", 6144, 2048, (2048,) * 3),
    ("hunyuan_image_2_1", "single_blocks.1.linear1", 7 * 3584, 3584, (3584,) * 3 + (14336,)),
    ("z_image", "layers.29.attention.qkv", 11520, 3840, (3840,) * 3),
    ("z_image", "layers.29.attention.out", 3840, 3840, ()),
    ("lumina2", "layers.2.attention.qkv", 3840, 2304, (2304, 768, 768)),  # 24 heads of 96, 8 of k
    ("ideogram4", "layers.2.attention.qkv", 3 * 4608, 4608, (4608,) * 3),
    ("wan", "blocks.0.self_attn.q", 1536, 1536, ()),
    ("qwen_image", "transformer_blocks.0.attn.to_q", WIDE, WIDE, ()),
    ("other", "joint_blocks.2.x_block.attn.qkv", 3 * 1536, 1536, (1536,) * 3),  # SD 3
    ("other", "blocks.2.attn.qkv_x", 3 * WIDE, WIDE, (WIDE,) * 3),  # Mochi
    ("other", "layers.2.attn.to_qkv", 5 * WIDE, WIDE, ()),  # Stable Audio: two differences more
    ("other", "layers.2.attn.kv_proj", 2 * WIDE, WIDE, ()),
]


@pytest.mark.parametrize("version, name, rows, columns, expected", FUSED)
def test_the_parts_of_a_fused_layer_have_the_rows_that_the_model_gives_them(
    version, name, rows, columns, expected
):
    architecture = architecture_named(version) or DEFAULT
    assert parts_of(name, linear(rows, columns), architecture) == expected


def test_the_fused_layers_of_every_architecture_are_among_those_examples():
    """A row with parts in the table and none here would go untested."""
    tested = {version for version, *_, expected in FUSED if expected}
    alike = {"flux_2_klein_4b", "flux_2_klein_9b"}
    for row in ARCHITECTURES:
        fused = any(
            max(rename.parts, len(rename.names)) > 1 for rename in (*row.diffusers, *row.musubi)
        )
        assert (row.base_model_version in tested | alike) == fused, row.title


def test_a_split_lora_of_z_image_names_its_parts_as_diffusers_does():
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                [
                    nn.ModuleDict(
                        {"attention": nn.ModuleDict({"qkv": nn.Linear(8, 24)})},
                    )
                ]
            )
        }
    )
    network = network_for(model, Z_IMAGE, split_qkv=True)
    state = state_dict_of(network, Z_IMAGE, "diffusers")
    assert {k.removeprefix("transformer.layers.0.attention.") for k in state} == {
        f"to_{part}.lora_{side}.weight" for part in "qkv" for side in "AB"
    }
    assert {tuple(t.shape) for t in state.values()} == {(2, 8), (8, 2)}


def test_averaged_checkpoints_stay_split_in_every_format(network, tmp_path):
    paths = [tmp_path / f"run-step{step:08d}.safetensors" for step in (1, 2)]
    for path in paths:
        write_adapter(path, state_dict_of(network, FLUX), {})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(2)
    merging = merged_tensors(prepare_merge(paths, [0.5], like_musubi=False))
    try:
        while True:
            next(merging)
    except StopIteration as stop:
        merged = stop.value
    again = network_for(Model(), FLUX, split_qkv=True)
    load_weights(again, read_adapter(merged, layer_shapes(Model()), FLUX))
    assert (
        converted(merged, "diffusers", FLUX).keys()
        == state_dict_of(again, FLUX, "diffusers").keys()
    )
    for ours, theirs in zip(again.in_order(), network.in_order(), strict=True):
        torch.testing.assert_close(ours.up, theirs.up * (0.25 + 0.5) / 2)
