"""The maths of one adapted layer: musubi's numbers, gradients, dropouts, dtypes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from comfyui_braid.engine.network.adapters import ADAPTERS, LoRA, factorization
from comfyui_braid.engine.network.attach import build_adapter
from comfyui_braid.engine.network.layers import LayerShape, shape_of
from comfyui_braid.engine.network.spec import KINDS, NetworkSpec

GOLDENS = Path(__file__).parent.parent / "goldens"
GOLDEN = json.loads((GOLDENS / "network_lora.json").read_text())
FACTORED = json.loads((GOLDENS / "network_loha_lokr.json").read_text())["cases"]
LAYERS = {
    "linear": nn.Linear(12, 10),
    "conv1d": nn.Conv1d(6, 4, 3, stride=2, padding=1),
    "conv2d": nn.Conv2d(6, 4, (3, 1), padding=(1, 0), dilation=(2, 1)),
    "conv2d_1x1": nn.Conv2d(6, 4, 1),
    "conv3d": nn.Conv3d(6, 4, (1, 2, 2), stride=(1, 2, 2)),
}
INPUTS = {
    "linear": (2, 3, 12),
    "conv1d": (2, 6, 9),
    "conv2d": (2, 6, 5, 4),
    "conv2d_1x1": (2, 6, 3, 3),
    "conv3d": (2, 6, 2, 4, 4),
}


def adapter(kind, layer, rank=3, dtype=torch.float32, **spec):
    """An adapter of a layer with every parameter drawn, so that nothing is zero."""
    built = build_adapter(
        shape_of(LAYERS[layer]),
        NetworkSpec(kind=kind, rank=rank, conv_rank=rank, conv_alpha=2.0, **spec),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return built.to(dtype)


def by_weight(layer, weight, x):
    """The layer's own operation with another weight and no bias."""
    module = LAYERS[layer]
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, weight)
    return module._conv_forward(x, weight, None)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_delta_is_the_layer_s_operation_with_delta_weight(kind, layer):
    built = adapter(kind, layer, dtype=torch.float64)
    x = torch.randn(INPUTS[layer], dtype=torch.float64)
    assert built.delta_weight().shape == LAYERS[layer].weight.shape
    torch.testing.assert_close(built.delta(x), by_weight(layer, built.delta_weight(), x))


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_loha_gives_the_same_through_thin_factors_and_through_the_dense_weight(rank):
    built = adapter("loha", "linear", rank=rank, dtype=torch.float64)
    x = torch.randn(INPUTS["linear"], dtype=torch.float64)
    assert built._thin_is_cheaper == (rank < 3)
    torch.testing.assert_close(built.delta(x), x @ built.delta_weight().T)


@pytest.mark.parametrize("rank", [1, 4])
def test_lokr_is_low_rank_only_where_that_is_smaller(rank):
    shape = LayerShape(in_features=36, out_features=64)
    built = build_adapter(shape, NetworkSpec(kind="lokr", rank=rank, alpha=2.0))
    names = {name: tuple(p.shape) for name, p in built.named_parameters()}
    if rank == 1:
        assert names == {"w1": (8, 6), "w2_a": (8, 1), "w2_b": (1, 6)}
        assert built.scale == 2.0
    else:
        assert names == {"w1": (8, 6), "w2": (8, 6)}
        assert built.scale == 1.0


@pytest.mark.parametrize(
    "dimension, factor, expected",
    [
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (250, -1, (10, 25)),
        (360, -1, (18, 20)),
        (512, -1, (16, 32)),
        (128, 4, (4, 32)),
        (250, 4, (2, 125)),
        (360, 8, (8, 45)),
        (1024, 16, (16, 64)),
        (12, 12, (1, 12)),
    ],
)
def test_factorization_is_lycoris_s(dimension, factor, expected):
    assert factorization(dimension, factor) == expected


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind, layer):
    built = adapter(kind, layer, rank=2, dtype=torch.float64)
    names = [name for name, _ in built.named_parameters()]

    def call(x, output, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            _Adding(built), {f"adapter.{k}": v for k, v in values.items()}, (output, x)
        )

    x = torch.randn(INPUTS[layer], dtype=torch.float64, requires_grad=True)
    output = by_weight(layer, built.delta_weight(), x).detach().requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in built.parameters()]
    assert torch.autograd.gradcheck(call, (x, output, *parameters))


class _Adding(nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, output, x):
        return self.adapter.add_to(output, x)


def test_forward_is_musubi_s():
    golden = GOLDEN["forward"]
    built = LoRA(
        LayerShape(in_features=4, out_features=6),
        {
            "down": torch.tensor(golden["lora_down"]).view(2, 4),
            "up": torch.tensor(golden["lora_up"]).view(6, 2),
        },
        alpha=1.0,
        rank=2,
    )
    x = torch.tensor(golden["x"]).view(2, 4)
    base = torch.tensor(golden["base_output"]).view(2, 6)
    whole, half = built.add_to(base, x), base + 0.5 * built.delta(x)
    for output, name in ((whole, "output"), (half, "output_multiplier_0.5")):
        expected = torch.tensor(golden[name]).view(2, 6)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7)


def musubi_draws(rank, generator, rows=6, columns=4):
    """A LoRA as musubi draws it: two nn.Linear are initialised first and the first drawn again."""
    built = LoRA(
        LayerShape(in_features=columns, out_features=rows),
        {"down": torch.empty(rank, columns), "up": torch.empty(rows, rank)},
        alpha=float(rank),
        rank=rank,
    )
    torch.rand(rank * columns + rows * rank, generator=generator)
    built.reset_parameters(generator)
    return built


def test_initial_values_are_musubi_s():
    generator = torch.Generator().manual_seed(1)
    state = GOLDEN["state_dict"]
    for key in [key for key in state if key.endswith("lora_down.weight")]:
        down, up = state[key], state[key.replace("lora_down", "lora_up")]
        built = musubi_draws(2, generator, rows=up["shape"][0], columns=down["shape"][1])
        assert built.down.flatten().tolist() == down["values"]
        assert built.up.flatten().tolist() == up["values"]


@pytest.mark.parametrize("case", GOLDEN["dropout"]["cases"], ids=lambda case: str(case["args"]))
def test_dropouts_are_musubi_s_draw_for_draw(case):
    built = musubi_draws(4, torch.Generator().manual_seed(1))
    with torch.no_grad():
        built.up.copy_(0.01 * torch.arange(24).view(6, 4))
    for name, value in case["args"].items():
        setattr(built, name, float(value))
    x, base = torch.ones(2, 3, 4), torch.zeros(2, 3, 6)
    torch.manual_seed(case["seed_before_forward"])
    delta = built.add_to(base, x)
    expected = torch.tensor(case["delta"]).view(2, 3, 6)
    torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
    built.eval()
    without = torch.tensor(GOLDEN["dropout"]["no_dropout_delta"]).view(2, 3, 6)
    torch.testing.assert_close(built.add_to(base, x), without, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=FACTORED, ids=lambda c: f"{c['kind']} {c['network_dim']} {c['factor']}")
def factored(request):
    """A LoHa or LoKr of musubi's on a Linear 12 → 10, and the adapter that Braid builds for it."""
    case = request.param
    spec = NetworkSpec(
        kind=case["kind"],
        rank=case["network_dim"],
        alpha=case["network_alpha"],
        lokr_factor=case["factor"],
    )
    return case, build_adapter(LayerShape(in_features=12, out_features=10), spec)


def test_loha_and_lokr_have_musubi_s_shapes_and_initial_values(factored):
    case, built = factored
    built.reset_parameters(torch.Generator().manual_seed(1))
    fresh = {
        built.KEYS[name]: {"shape": list(p.shape), "values": p.flatten().tolist()}
        for name, p in built.named_parameters()
    }
    assert fresh == case["fresh_seed_1"]
    assert (built.alpha, built.scale) == (case["alpha_saved"], case["scale"])


def test_loha_and_lokr_compute_and_drop_as_musubi_s_draw_for_draw(factored):
    case, built = factored
    with torch.no_grad():
        for parameter in built.parameters():
            numbers = torch.arange(parameter.numel()) * 7 % 11 - 5
            parameter.copy_(numbers.view(parameter.shape) * 0.1)
    x, base = (torch.arange(24) % 5 - 2).view(2, 12) * 0.5, torch.zeros(2, 10)

    def assert_delta(name):
        torch.manual_seed(7)
        expected = torch.tensor(case[name]).view(2, 10)
        torch.testing.assert_close(built.add_to(base, x), expected, rtol=1e-5, atol=1e-6)

    built.eval()
    assert_delta("delta")
    built.train()
    built.rank_dropout = 0.5
    assert_delta("delta_rank_dropout_0.5_seed_7")
    built.module_dropout = 0.5
    assert_delta("delta_rank_and_module_dropout_0.5_seed_7")


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropouts_leave_the_expected_delta_as_it_is(kind, layer):
    built = adapter(kind, layer, neuron_dropout=0.3, rank_dropout=0.2)
    x = torch.randn(INPUTS[layer])
    torch.manual_seed(0)
    with torch.no_grad():
        mean = sum(built.delta(x) for _ in range(1500)) / 1500
        expected = built.eval().delta(x)
    assert (mean - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_rank_dropout_draws_one_mask_an_item_for_all_its_positions(layer):
    built = adapter("lora", layer, rank=8, rank_dropout=0.5)
    x = torch.randn(INPUTS[layer][0], 1, 12).expand(2, 5, 12)
    if layer == "conv2d":
        x = torch.randn(2, 6, 1, 1).expand(2, 6, 7, 3)
    torch.manual_seed(3)
    delta = built.delta(x)
    inner = delta[:, 1:-1] if layer == "linear" else delta[:, :, 2:-2]
    first = inner[:, :1] if layer == "linear" else inner[:, :, :1]
    torch.testing.assert_close(inner, first.expand_as(inner))
    assert not torch.equal(built.delta(x), delta)


def test_the_sum_is_rounded_once_to_the_dtype_of_the_base():
    built = adapter("lora", "linear")
    x = torch.randn(2, 3, 12, dtype=torch.bfloat16)
    base = torch.randn(2, 3, 10, dtype=torch.bfloat16)
    exact = base.float() + built.delta(x.float())
    out = built.add_to(base, x)  # parameters float32, base bfloat16: computed in float32
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.to(torch.bfloat16))
    built.compute_dtype = torch.bfloat16
    out = built.add_to(base, x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_computing_in_bfloat16_still_gives_float32_gradients(kind):
    built = adapter(kind, "linear")
    built.compute_dtype = torch.bfloat16
    base = torch.zeros(2, 3, 10, dtype=torch.bfloat16)
    built.add_to(
        base, torch.randn(2, 3, 12, dtype=torch.bfloat16)
    ).float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in built.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind):
    built = build_adapter(shape_of(LAYERS["linear"]), NetworkSpec(kind=kind, rank=3))
    built.reset_parameters(torch.Generator().manual_seed(0))
    assert not built.delta_weight().any()
    assert any(parameter.any() for parameter in built.parameters())


def test_a_lora_saves_for_backward_only_its_input_and_the_inner_activations():
    built = adapter("lora", "linear")
    x = torch.randn(64, 12, requires_grad=True)
    base = torch.randn(64, 10, requires_grad=True)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        built.add_to(base, x)
    own = {p.untyped_storage().data_ptr() for p in built.parameters()}
    sizes = sorted(t.numel() for pointer, t in saved.items() if pointer not in own)
    assert sizes == [64 * 3, 64 * 12]


def test_every_kind_has_its_keys():
    assert set(ADAPTERS) == set(KINDS)
    for kind in KINDS:
        names = {name for name, _ in adapter(kind, "linear").named_parameters()}
        assert names <= set(ADAPTERS[kind].KEYS)
