import pytest
import torch
from ema_files import ALPHA, DOWN, UP, adapter, average_of, checkpoints, save, write_run
from safetensors.torch import load_file

from comfyui_braid.engine.ema.product import refactor
from comfyui_braid.engine.ema.schedule import BetaRamp, Power
from comfyui_braid.engine.files import read_header

HALF = BetaRamp(beta=0.5, beta2=0.5)


def _product(tensors):
    return tensors[UP].flatten(1).double() @ tensors[DOWN].flatten(1).double()


def _rotated(tensors, seed=0):
    """The same function in another gauge: the rank dimensions turned."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    turned = dict(tensors)
    for key in tensors:
        if key.endswith("down.weight"):
            turned[key] = q @ tensors[key]
            turned[key.replace("down", "up")] = tensors[key.replace("down", "up")] @ q.T
    return turned


def test_refactoring_is_the_best_low_rank_approximation():
    generator = torch.Generator().manual_seed(0)
    ups = [torch.randn(30, 4, generator=generator) for _ in range(5)]
    downs = [torch.randn(4, 20, generator=generator) for _ in range(5)]
    weights = [0.1, 0.0, 0.2, 0.3, 0.4]
    product = refactor(ups, downs, weights)
    whole = sum(w * u.double() @ d.double() for w, u, d in zip(weights, ups, downs, strict=True))
    u, s, vh = torch.linalg.svd(whole)
    best = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
    assert torch.allclose((product.up @ product.down).double(), best, atol=1e-5)
    assert product.removed == pytest.approx(float(s[4:].square().sum()), rel=1e-5)
    assert product.total == pytest.approx(float(whole.square().sum()), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e10, 1e25])
def test_factors_whose_products_leave_the_range_of_float32_are_refactored(scale):
    generator = torch.Generator().manual_seed(1)
    ups = [torch.randn(30, 4, generator=generator) * scale for _ in range(3)]
    downs = [torch.randn(4, 20, generator=generator) * scale for _ in range(3)]
    product = refactor(ups, downs, [0.2, 0.3, 0.5])
    plain = refactor([up / scale for up in ups], [down / scale for down in downs], [0.2, 0.3, 0.5])
    close = {"rtol": 1e-4, "atol": 1e-4}
    ours = product.up.double() @ product.down.double() / scale**2
    torch.testing.assert_close(ours, plain.up.double() @ plain.down.double(), **close)
    assert product.removed / product.total == pytest.approx(plain.removed / plain.total, rel=1e-5)


def test_files_that_are_zero_or_of_lower_rank_average_to_themselves():
    up, down = torch.randn(30, 1) @ torch.randn(1, 4), torch.randn(4, 20)
    for factor in (up, torch.zeros_like(up)):
        product = refactor([factor] * 3, [down] * 3, [0.2, 0.3, 0.5])
        assert torch.allclose(product.up @ product.down, factor @ down, atol=1e-5)
        assert product.removed <= 1e-10 * max(product.total, 1e-30)


def test_a_layer_smaller_than_the_rank_keeps_its_shape():
    product = refactor([torch.eye(2, 6)] * 2, [torch.eye(6, 3)] * 2, [0.5, 0.5])
    assert product.up.shape == (2, 6) and product.down.shape == (6, 3)
    assert torch.allclose(product.up @ product.down, torch.eye(2, 6) @ torch.eye(6, 3), atol=1e-6)


def test_files_in_another_gauge_average_to_themselves_where_factors_would_not(tmp_path):
    one = adapter()
    paths = [save(tmp_path / f"{i}.safetensors", t) for i, t in enumerate((one, _rotated(one)))]
    product = average_of(checkpoints(paths), HALF, space="product", sort="given")
    assert torch.allclose(_product(product.lora), _product(one), atol=1e-5)
    assert product.report["truncation_error"] < 1e-6
    factors = average_of(checkpoints(paths), HALF, sort="given")
    assert (_product(factors.lora) - _product(one)).norm() > 0.1 * _product(one).norm()


def test_the_product_average_is_nearer_to_the_averaged_update_than_the_factor_average(tmp_path):
    paths = write_run(tmp_path, 6, drift=0.3)
    run = checkpoints(paths, range(100, 700, 100))
    product = average_of(run, Power(sigma_rel=0.25), space="product")
    factors = average_of(run, Power(sigma_rel=0.25))
    weights = product.report["weights"]
    exact = sum(w * _product(load_file(p)) for w, p in zip(weights, paths, strict=True))

    def error(average):
        return float((_product(average.lora) - exact).norm() / exact.norm())

    assert error(product) < error(factors)
    assert 0 < product.report["truncation_error"] < 1


def test_dtypes_convolutions_alphas_and_added_tensors_are_kept(tmp_path):
    def conv(seed):
        tensors = adapter(seed, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(seed)
        tensors[DOWN] = torch.randn(4, 3, 3, 3, generator=generator).bfloat16()
        tensors[UP] = torch.randn(6, 4, 1, 1, generator=generator).bfloat16()
        tensors["lora_unet_n.diff"] = torch.full((3,), float(seed), dtype=torch.bfloat16)
        return tensors

    paths = [save(tmp_path / f"{i}.safetensors", conv(i), ss_steps=str(i)) for i in (1, 2)]
    output = tmp_path / "out.safetensors"
    lora = average_of(checkpoints(paths, [1, 2]), HALF, output, space="product").lora
    assert {k: (v.shape, v.dtype) for k, v in lora.items()} == {
        k: (v.shape, v.dtype) for k, v in conv(1).items()
    }
    assert float(lora[ALPHA]) == 4.0
    assert torch.equal(lora["lora_unet_n.diff"].float(), torch.full((3,), 1.5))
    metadata = read_header(output).metadata
    assert metadata["ss_steps"] == "2" and len(metadata["sshs_model_hash"]) == 64


@pytest.mark.parametrize(
    "key", ["lora_unet_a.hada_w1_a", "lora_unet_a.dora_scale", "lora_unet_a.lora_mid.weight"]
)
def test_adapters_that_are_no_plain_product_are_refused_by_key(key, tmp_path):
    tensors = adapter() | {key: torch.ones(3)}
    paths = [save(tmp_path / f"{i}.safetensors", tensors) for i in range(2)]
    with pytest.raises(ValueError, match=f"{key}.*not belong to a plain LoRA.*space 'factors'"):
        average_of(checkpoints(paths), HALF, space="product", sort="given")


def test_a_factor_without_its_partner_is_refused(tmp_path):
    tensors = {DOWN: torch.ones(4, 8)}
    with pytest.raises(ValueError, match="lora_down.*has no.*lora_up"):
        average_of(
            checkpoints([save(tmp_path / "a.safetensors", tensors)]),
            HALF,
            space="product",
            sort="given",
        )


def test_an_unknown_space_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose one of factors, product"):
        average_of(checkpoints(write_run(tmp_path, 1)), HALF, space="weights", sort="given")
