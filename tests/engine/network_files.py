"""A small model under FLUX's names, networks for it, and what weights from a file amount to."""

import torch
from torch import Tensor, nn

from comfyui_braid.engine.network.adapters import ADAPTERS, Adapter
from comfyui_braid.engine.network.architectures import architecture_of
from comfyui_braid.engine.network.attach import build_network
from comfyui_braid.engine.network.layers import LayerShape
from comfyui_braid.engine.network.spec import NetworkSpec
from comfyui_braid.engine.network.targets import select_targets
from comfyui_braid.engine.network.weights import AdapterWeights

FLUX = architecture_of({"image_model": "flux"})
Z_IMAGE = architecture_of({"image_model": "lumina2", "dim": 3840})


class Model(nn.Module):
    """Linear and convolutions in two blocks, under names that FLUX has."""

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "img_attn": nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)}),
                    "img_mlp": nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)),
                }
            )
            for _ in range(2)
        )
        self.single_blocks = nn.ModuleList([nn.ModuleDict({"linear1": nn.Linear(8, 56)})])


def linear(rows, columns):
    return LayerShape(in_features=columns, out_features=rows)


def factors(rows, columns, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, columns, generator=generator),
        torch.randn(rows, rank, generator=generator),
    )


def network_for(model, architecture, **spec):
    spec = NetworkSpec(**{"rank": 2, "alpha": 3.0} | spec)
    network = build_network(select_targets(model, spec, architecture).selected, spec, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def adapter_of(weights: AdapterWeights, shape: LayerShape) -> Adapter:
    """The adapter of one layer with these weights."""
    tensors = {key: tensor.detach().clone() for key, tensor in weights.tensors.items()}
    return ADAPTERS[weights.kind](shape, tensors, alpha=weights.alpha, rank=weights.rank)


def delta(weights: AdapterWeights, shape: LayerShape) -> Tensor:
    """The change of the layer's weight."""
    return adapter_of(weights, shape).delta_weight()
