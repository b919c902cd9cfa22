"""Attaching leaves no trace; optimizer groups and weight norms are musubi's."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from comfyui_braid.engine.network.architectures import DEFAULT
from comfyui_braid.engine.network.attach import (
    Network,
    attached,
    build_network,
    parameter_groups,
    scale_weight_norms,
)
from comfyui_braid.engine.network.spec import KINDS, NetworkSpec
from comfyui_braid.engine.network.targets import select_targets

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "network_lora.json").read_text())


class Block(nn.Module):
    """As in the golden: the block of musubi's tiny model."""

    def __init__(self):
        super().__init__()
        self.img_attn_qkv = nn.Linear(4, 6)
        self.img_mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.img_mod = nn.Linear(4, 4)

    def forward(self, x):
        return self.img_mlp(x) + self.img_mod(x) + self.img_attn_qkv(x)[..., :4]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList([Block(), Block()])
        self.final = nn.Linear(4, 4)

    def forward(self, x):
        for block in self.double_blocks:
            x = block(x)
        return self.final(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def network_for(model, seed=1, **spec) -> Network:
    spec = NetworkSpec(**{"rank": 2, "alpha": 1.0} | spec)
    return build_network(select_targets(model, spec, DEFAULT).selected, spec, seed)


def randomised(network):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def trace(model):
    """Everything that could be left behind on any module: attributes, hooks, bits of weights."""
    return {
        name: {
            key: (list(value) if isinstance(value, dict) else repr(value), id(value))
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }, {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    attributes, weights = before
    now, tensors = trace(model)
    assert now == attributes
    assert all(torch.equal(tensors[key], weights[key]) for key in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_attached_adds_the_deltas_and_leaves_the_model_bit_identical(model, kind):
    network, x = randomised(network_for(model, kind=kind)).eval(), torch.randn(3, 4)
    before, plain = trace(model), model(x)
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, adapter in network.items():
            merged.get_submodule(name).weight += adapter.delta_weight()
    with attached(model, network):
        torch.testing.assert_close(model(x), merged(x), rtol=1e-4, atol=1e-4)
    assert_untouched(model, before)
    assert torch.equal(model(x), plain)


def test_attached_leaves_no_trace_after_an_exception_or_a_closed_generator(model):
    network, before = network_for(model), trace(model)
    with pytest.raises(RuntimeError, match="stop"), attached(model, network):
        raise RuntimeError("stop")
    assert_untouched(model, before)

    def generator():
        with attached(model, network):
            yield 1

    steps = generator()
    next(steps)
    steps.close()
    assert_untouched(model, before)


def test_nested_networks_add_up_and_leave_in_any_order(model):
    one, two = randomised(network_for(model)).eval(), randomised(network_for(model, rank=3)).eval()
    before, x = trace(model), torch.randn(3, 4)
    layer = model.double_blocks[0].img_attn_qkv
    outer, inner = attached(model, one), attached(model, two)
    outer.__enter__()
    inner.__enter__()
    deltas = [
        dict(network.items())["double_blocks.0.img_attn_qkv"].delta(x) for network in (one, two)
    ]
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias) + sum(deltas)
    )
    outer.__exit__(None, None, None)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias) + deltas[1]
    )
    inner.__exit__(None, None, None)
    assert_untouched(model, before)


def test_a_network_does_not_attach_to_a_model_that_lacks_a_layer(model):
    network = network_for(model)
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="built for another model: 6 of its 6 layers"):
        with attached(other, network):
            pass
    assert not other[0]._forward_hooks


def test_only_the_adapters_learn(model):
    network = randomised(network_for(model))
    model.requires_grad_(False)
    with attached(model, network):
        model(torch.randn(3, 4)).square().mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in network.parameters())


def test_the_same_seed_gives_the_same_network_whatever_the_global_generator_did(model):
    torch.manual_seed(123)
    one = network_for(model, seed=7)
    torch.rand(5)
    two, other = network_for(model, seed=7), network_for(model, seed=8)
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(
        not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_a_network_with_the_same_name_twice_is_refused():
    clash = nn.Module()
    clash.add_module("a", nn.ModuleDict({"0": nn.ModuleDict({"b_c": nn.Linear(4, 4)})}))
    clash.a["0"].add_module("b", nn.ModuleDict({"c": nn.Linear(4, 4)}))
    with pytest.raises(ValueError, match="same name once"):
        network_for(clash)


@pytest.mark.parametrize(
    "case",
    [case for case in GOLDEN["loraplus"]["cases"] if "unet_lr" not in case],
    ids=lambda case: str(case["loraplus_lr_ratio"]),
)
def test_optimizer_groups_are_musubi_s(model, case):
    ratio = case["loraplus_lr_ratio"]
    if ratio is not None and float(ratio) <= 0:  # musubi drops the up matrices in silence
        with pytest.raises(ValueError, match="loraplus_lr_ratio=.*must be above 0"):
            network_for(model, loraplus_lr_ratio=float(ratio))
        return
    network = network_for(model, loraplus_lr_ratio=None if ratio is None else float(ratio))
    groups = parameter_groups(network, 1e-4)
    assert [group["name"] for group in groups] == case["descriptions"]
    for group, golden in zip(groups, case["groups"], strict=True):
        assert group["lr"] == pytest.approx(golden["lr"])
        assert [musubi_name(network, parameter) for parameter in group["params"]] == golden[
            "params"
        ]


def musubi_name(network, parameter):
    (name,) = (name for name, other in network.named_parameters() if other is parameter)
    _, layer, matrix = name.split(".")
    return f"{layer}.lora_{matrix}.weight"


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loraplus_on_a_kind_without_up_matrices_trains_everything_alike(model, kind):
    network = network_for(model, kind=kind, loraplus_lr_ratio=4.0)
    groups = parameter_groups(network, 1e-4)
    assert [group["name"] for group in groups] == ["unet"]
    assert len(groups[0]["params"]) == len(list(network.parameters()))


def test_scale_weight_norms_is_musubi_s(model):
    golden = GOLDEN["scale_weight_norms"]
    limit = float(golden["max_norm"])
    network = randomised(network_for(model))
    with torch.no_grad():  # the norms of the golden
        for (_, adapter), norm in zip(network.items(), golden["norms_before"], strict=True):
            adapter.up.mul_(norm / adapter.delta_weight().norm())
    directions = [adapter.delta_weight() for _, adapter in network.items()]
    result = scale_weight_norms(network, limit)
    after = torch.stack([adapter.delta_weight().norm() for _, adapter in network.items()])
    assert int(result.scaled) == int(golden["keys_scaled"])
    torch.testing.assert_close(after, torch.tensor(golden["norms_after"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.norms, after, rtol=1e-5, atol=0)
    for before, (_, adapter), norm in zip(
        directions, network.items(), golden["norms_before"], strict=True
    ):
        torch.testing.assert_close(
            adapter.delta_weight(), before * limit / norm, rtol=1e-4, atol=1e-6
        )


def test_scale_weight_norms_leaves_small_weights_bit_identical_and_is_for_lora_only(model):
    network = randomised(network_for(model))
    before = [parameter.clone() for parameter in network.parameters()]
    result = scale_weight_norms(network, 1e6)
    assert int(result.scaled) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    after = torch.stack([adapter.delta_weight().norm() for _, adapter in network.items()])
    torch.testing.assert_close(result.norms, after)
    with pytest.raises(ValueError, match="scale_weight_norms=1.0: works on lora only, not on lokr"):
        scale_weight_norms(network_for(model, kind="lokr"), 1.0)


def test_a_fresh_network_has_norm_zero_in_the_log_as_in_musubis(model):
    """max_norm/average_key_norm and max_key_norm of musubi-tuner 30c658c's run with
    --scale_weight_norms 0.05 begin at 0.0 and pass 0.0308 (golden run loraplus_accum2_norms)."""
    result = scale_weight_norms(network_for(model), 0.05)
    assert not result.norms.any() and int(result.scaled) == 0


def test_the_network_goes_where_the_model_goes_and_computes_in_the_dtype_asked_for(model):
    network = randomised(network_for(model)).eval()
    network.set_compute_dtype(torch.bfloat16)
    model.to(torch.bfloat16)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    with attached(model, network):
        assert model(x).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
