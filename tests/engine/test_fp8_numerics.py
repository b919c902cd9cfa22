import hashlib
import json
from pathlib import Path

import pytest
import torch

from comfyui_braid.engine.fp8 import dequantize as dequantizing
from comfyui_braid.engine.fp8.dequantize import decode, decode_bytes, dequantize
from comfyui_braid.engine.fp8.policy import Fp8Policy
from comfyui_braid.engine.fp8.stream import quantize_weight

GOLDENS = json.loads(
    (Path(__file__).parent.parent / "goldens" / "fp8_quantize.json").read_text(encoding="utf-8")
)
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def golden_weight(case):
    rule, dtype = case["input"], getattr(torch, case["dtype"].removeprefix("torch."))
    if "randn_seed" not in rule:
        return torch.tensor(rule["values"]).reshape(case["shape"]).to(dtype)
    generator = torch.Generator().manual_seed(rule["randn_seed"])
    weight = torch.randn(case["shape"], generator=generator, dtype=torch.float32) * rule["factor"]
    if "then" in rule:
        weight[3, 17], weight[5, 100] = 6.0, -3.0
    return weight.to(dtype)


@pytest.mark.parametrize(
    "case",
    [case for case in GOLDENS["quantize_weight"] if len(case["shape"]) == 2],
    ids=lambda case: f"{case['name']}-{case['dtype'].removeprefix('torch.')}",
)
def test_musubi_rounding_gives_musubis_bytes_and_scales(case):
    policy = Fp8Policy(
        granularity=case["requested_mode"],
        block_size=case["block_size"],
        fp8_format=case["fp8_dtype"].removeprefix("torch.float8_"),
        scale_rounding="musubi",
    )
    made = quantize_weight(golden_weight(case), policy, CPU)
    scale = made.scale.flatten()
    expected = torch.tensor(case["scale"])
    assert torch.equal(scale[: len(expected)], expected)
    one_block = case["scale_shape"][1:] == [1, 1]  # a block as wide as the row: a channel
    assert list(made.scale.shape) == case["scale_shape"][: 2 if one_block else None]
    codes = made.codes.view(torch.uint8).flatten()
    if "fp8_u8" in case:
        assert codes.tolist() == case["fp8_u8"]
    else:
        assert hashlib.sha256(codes.numpy().tobytes()).hexdigest() == case["fp8_sha256"]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_where_musubis_float16_scale_underflows_to_zero_its_codes_follow(granularity):
    """From musubi-tuner 30c658c, quantize_weight of the same weight: 126 and 254 are +-448, and the
    zeros, 0 / 0, are code 0; times the scale all is 0."""
    weight = torch.tensor([[2.0**-23, -(2.0**-22), 0.0, -0.0], [0.0] * 4], dtype=torch.float16)
    policy = Fp8Policy(granularity=granularity, block_size=2, scale_rounding="musubi")
    made = quantize_weight(weight, policy, CPU)
    assert made.codes.view(torch.uint8).tolist() == [[126, 254, 0, 0], [0, 0, 0, 0]]
    assert not made.scale.any()


@pytest.mark.parametrize(
    "case", GOLDENS["patched_linear_forward"], ids=lambda c: c["mode"] + c["dtype"]
)
def test_a_linear_on_dequantised_weights_gives_musubis_output(case):
    dtype = getattr(torch, case["dtype"].removeprefix("torch."))

    def drawn(seed, shape, factor):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * factor).to(dtype)

    policy = Fp8Policy(granularity=case["mode"], scale_rounding="musubi")
    made = quantize_weight(drawn(21, (8, 128), 0.05), policy, CPU)
    weight = dequantize(made.codes, made.scale, dtype)
    y = torch.nn.functional.linear(drawn(23, (2, 3, 128), 1.0), weight, drawn(22, (8,), 0.05))
    assert torch.allclose(y.float().flatten(), torch.tensor(case["y"]), rtol=1e-2, atol=2e-3)
    exact = dtype == torch.float32
    assert not exact or torch.allclose(y.flatten(), torch.tensor(case["y"]), rtol=0, atol=1e-6)


def families():
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(256, 512, generator=generator) * 0.02
    spread = gaussian * torch.randn(256, 1, generator=generator).exp()
    heavy = gaussian * (torch.randn(256, 512, 3, generator=generator).square().mean(-1)).rsqrt()
    outliers = gaussian.clone()
    outliers.view(-1)[torch.randint(0, outliers.numel(), (20,), generator=generator)] *= 1000
    columns = gaussian.clone()
    columns[:, torch.randint(0, 512, (2,), generator=generator)] *= 60
    return {
        "gaussian": gaussian,
        "row spread": spread,
        "student t": heavy,
        "outliers": outliers,
        "outlier columns": columns,
    }


def relative_error(weight, policy):
    made = quantize_weight(weight, policy, CPU)
    difference = dequantize(made.codes, made.scale, torch.float32) - weight.float()
    return float(difference.norm() / weight.float().norm())


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_float32_scales_are_no_worse_than_musubis(family, granularity):
    weight = families()[family].bfloat16()
    ours = relative_error(weight, Fp8Policy(granularity=granularity))
    theirs = relative_error(weight, Fp8Policy(granularity=granularity, scale_rounding="musubi"))
    assert ours <= 1.003 * theirs


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("fp8_format", ["e4m3fn", "e5m2"])
def test_the_scale_search_never_loses(family, granularity, fp8_format):
    weight = families()[family].bfloat16()
    policy = dict(granularity=granularity, fp8_format=fp8_format)
    searched = relative_error(weight, Fp8Policy(**policy, scale_search="mse"))
    assert searched <= 1.001 * relative_error(weight, Fp8Policy(**policy))


def test_block_64_with_search_beats_musubis_block_64_by_12_percent_on_gaussians():
    weight = families()["gaussian"].bfloat16()
    ours = relative_error(weight, Fp8Policy(scale_search="mse"))
    assert ours <= 0.88 * relative_error(weight, Fp8Policy(scale_rounding="musubi"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("search", ["amax", "mse"])
def test_codes_do_not_depend_on_the_chunking(dtype, granularity, search, monkeypatch):
    weight = families()["student t"][:96].to(dtype)
    policy = Fp8Policy(granularity=granularity, scale_search=search)
    whole = quantize_weight(weight, policy, CPU)
    for elements in (1, 700, 5000):
        monkeypatch.setattr(dequantizing, "CHUNK_ELEMENTS", elements)
        made = quantize_weight(weight, policy, CPU)
        assert torch.equal(made.codes.view(torch.uint8), whole.codes.view(torch.uint8))
        assert torch.equal(made.scale, whole.scale)


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pair_table_decodes_every_code_exactly(fp8, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(fp8)
    expected = codes.to(dtype)
    assert torch.equal(decode(codes, dtype).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(decode_bytes(codes).nan_to_num(7.0), codes.float().nan_to_num(7.0))


@pytest.mark.parametrize("shape", [(3, 5), (4, 6)])
def test_an_odd_number_of_codes_decodes_too(shape):
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    assert torch.equal(decode(codes, torch.bfloat16), codes.to(torch.bfloat16))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_dequantised_weights_are_within_half_a_unit_of_the_exact_product(granularity):
    made = quantize_weight(families()["gaussian"], Fp8Policy(granularity=granularity), CPU)
    codes = made.codes.to(torch.float64)
    grouped = codes.view(256, made.scale.shape[1], -1) if made.scale.ndim == 3 else codes
    oracle = (grouped * made.scale.double()).view(256, 512)
    got = dequantize(made.codes, made.scale, torch.bfloat16).double()
    assert ((got - oracle).abs() <= oracle.abs() * 2**-8).all()


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused(granularity, bad):
    weight = torch.randn(8, 64)
    weight[5, 3] = bad
    with pytest.raises(FloatingPointError, match="1 values are NaN or Inf"):
        quantize_weight(weight, Fp8Policy(granularity=granularity), CPU)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("search", ["amax", "mse"])
def test_a_weight_of_zeros_stays_zero(granularity, search):
    policy = Fp8Policy(granularity=granularity, scale_search=search)
    made = quantize_weight(torch.zeros(4, 128), policy, CPU)
    assert torch.equal(dequantize(made.codes, made.scale, torch.float32), torch.zeros(4, 128))
    assert torch.isfinite(made.scale).all() and (made.scale > 0).all()


def test_the_reported_error_is_the_real_one():
    weight = families()["gaussian"]
    made = quantize_weight(weight, Fp8Policy(), CPU)
    assert made.relative_rms == pytest.approx(relative_error(weight, Fp8Policy()), rel=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 3e36])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_the_scale_search_and_the_reported_error_hold_for_weights_of_any_size(size, granularity):
    weight = families()["gaussian"][:32] * (size / 0.02)

    def error(search):
        made = quantize_weight(weight, Fp8Policy(granularity=granularity, scale_search=search), CPU)
        exact = weight.double()
        wrong = dequantize(made.codes, made.scale, torch.float32).double() - exact
        assert made.relative_rms == pytest.approx(float(wrong.norm() / exact.norm()), rel=1e-3)
        return made.relative_rms

    assert 0.015 < error("mse") <= error("amax") < 0.03
