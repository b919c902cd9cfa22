import collections
import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MODELS, build
from torch import nn

from comfyui_braid.engine.comfyui.differentiable.frozen import frozen
from comfyui_braid.engine.comfyui.differentiable.gradient_checkpointing import (
    find_blocks,
    graphs_alive,
    recomputing,
)
from comfyui_braid.engine.comfyui.differentiable.inplace import differentiates

BLOCKS = {
    "flux": 6,
    "flux_dev": 6,
    "wan": 3,
    "qwen_image": 2,
    "hunyuan_video": 6,
    "lumina2": 4,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_repeated_block_of_an_architecture_is_found(name):
    model = build(name).model.diffusion_model
    found = find_blocks(model)
    outermost = [b for b in found if not any(b in set(o.modules()) for o in found if o is not b)]
    assert len(outermost) == BLOCKS[name]
    assert graphs_alive(model, gradient_checkpointing=False) == 3 + BLOCKS[name] / 2
    assert graphs_alive(model, gradient_checkpointing=True) == 3


def test_the_transformers_and_residual_blocks_of_a_unet_are_found():
    found = {type(block).__name__ for block in find_blocks(build("sd15").model.diffusion_model)}
    assert {"ResBlock", "SpatialTransformer", "BasicTransformerBlock"} <= found
    assert set(MODELS) - set(BLOCKS) == {"sd15"}


@dataclass
class Modulation:
    shift: torch.Tensor
    scale: torch.Tensor


Pair = collections.namedtuple("Pair", "x y")


class Block(nn.Module):
    """Adds in place; takes and returns structures, views and what is not a tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen = []

    def forward(self, pair, *, mods, options):
        self.seen.append(options["index"])
        x, y = pair
        x += self.layer(x * mods[0].scale + mods[0].shift) * options["gain"]
        y.mul_(2).add_(x)
        both = torch.cat([x, y])
        return Pair(both[: len(x)], y), "kept", {"mask": torch.ones(2, dtype=torch.bool)}


class Model(nn.Module):
    """Changes its options and its blocks' outputs in place between blocks."""

    def __init__(self, block=Block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x, shift):
        options = {"index": -1, "gain": torch.tensor(0.5)}
        pair = Pair(x * 1, x + 1)
        mods = (Modulation(shift, shift * 2),)
        for index, block in enumerate(self.blocks):
            options["index"] = index
            pair, kept, extra = block(pair, mods=mods, options=options)
            assert kept == "kept" and extra["mask"].all()
            pair.x.add_(0.25)
        return pair.x + pair.y


def run(model, checkpointing):
    for parameter in model.parameters():
        parameter.grad = None
    shift = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if checkpointing:
        with recomputing(model) as count:
            assert count == 3
            model(x, shift).square().sum().backward()
    else:
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            model(x, shift).square().sum().backward()
    return [shift.grad, *(p.grad for p in model.parameters())]


def test_structures_views_and_in_place_changes_around_blocks_keep_gradients_exact():
    torch.manual_seed(0)
    model = Model().double()
    for found, expected in zip(run(model, True), run(model, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_block_run_again_sees_the_options_of_its_own_turn():
    model = Model().double()
    run(model, True)
    for index, block in enumerate(model.blocks):
        assert set(block.seen) == {index} and len(block.seen) >= 2


class SavesWhatItChanges(nn.Module):
    """An in-place change of what GELU has saved: plain autograd cannot go back through it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, pair, *, mods, options):
        x = self.layer(pair.x)
        y = F.gelu(x)
        x += 1
        return Pair(x, y + pair.y), "kept", {"mask": torch.ones(2, dtype=torch.bool)}


def test_a_block_that_changes_what_it_saved_is_guarded_after_one_trial():
    model = Model(SavesWhatItChanges).double()
    expected = run(model, False)
    with recomputing(model):
        states = [block.forward for block in model.blocks]
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = None
            shift = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
            model(x, shift).square().sum().backward()
            found = [p.grad for p in model.parameters()]
            for a, b in zip(found, expected[1:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert all(state.guarded and not state.proven for state in states)


def test_the_trial_finds_overwritten_tensors_and_touches_no_gradient():
    weight = torch.ones(3, requires_grad=True)
    x = weight * 2
    good = F.gelu(x) * 3
    assert differentiates([good]) and weight.grad is None
    good.sum().backward()
    x = weight * 2
    bad = F.gelu(x)
    x += 1
    before = weight.grad.clone()
    assert not differentiates([bad])
    assert torch.equal(weight.grad, before)


def test_other_errors_of_the_trial_are_not_hidden():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        differentiates([Broken.apply(torch.ones(1, requires_grad=True))])


def test_a_change_of_a_saved_input_from_outside_raises_instead_of_going_wrong():
    class Careless(Model):
        def forward(self, x, shift):
            pair = Pair(x * shift, x + shift)
            options = {"index": 0, "gain": torch.tensor(0.5)}
            out, _, _ = self.blocks[0](pair, mods=(Modulation(shift, shift),), options=options)
            pair.x.add_(1)  # the block still needs it
            return out.x + out.y

    model = Careless().double()
    with recomputing(model):
        x, shift = torch.ones(3, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        loss = model(x, shift.requires_grad_()).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_without_gradients_a_block_runs_once_and_plainly():
    model = Model().double()
    with recomputing(model), torch.no_grad():
        model(torch.ones(3, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    assert [len(block.seen) for block in model.blocks] == [1, 1, 1]


def test_leaving_restores_a_forward_that_another_pack_had_put_there():
    model = Model()
    block = model.blocks[0]
    own = block.forward
    block.forward = theirs = lambda *args, **kwargs: own(*args, **kwargs)
    with recomputing(model), frozen(model):
        assert block.forward is not theirs
    assert block.forward is theirs
    assert "forward" not in vars(model.blocks[1])
    assert "forward" not in vars(model.blocks[1].layer)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3, padding=1, dilation=1), (2, 3, 8)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), groups=2), (2, 4, 7, 8)),
        (nn.Conv3d(3, 4, (1, 2, 2), stride=(1, 2, 2)), (1, 3, 2, 4, 4)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (1, 3, 5, 5)),
        (nn.Linear(5, 7), (2, 3, 5)),
        (nn.Linear(5, 7, bias=False), (5,)),
        (nn.LayerNorm(6), (2, 3, 6)),
        (nn.LayerNorm(6, elementwise_affine=False), (2, 3, 6)),
        (nn.RMSNorm(6, eps=1e-5), (2, 3, 6)),
        (nn.GroupNorm(2, 6), (2, 6, 3, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_frozen_layer_computes_and_differentiates_like_its_own(layer, shape):
    x = torch.randn(shape, dtype=torch.float64)
    with torch.inference_mode():
        model = nn.Sequential(copy.deepcopy(layer)).double()
        expected = model(x)
    assert all(p.is_inference() for p in model.parameters())
    with frozen(model):
        assert torch.equal(model(x), expected)
        assert torch.autograd.gradcheck(model, x.requires_grad_())
        y = model(x)
        y += 1  # models do
        y.sum().backward()
