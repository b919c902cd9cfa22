"""A network of adapters, and the context in which a model computes with it.

The adapters hang on the layers by forward hooks: the hook adds to what the layer returned, whatever
made that (a plain Linear, a quantised one, an autograd Function of ours), so the mechanism composes
with anything that wraps the layer. Leaving the context removes the hooks and nothing else was
touched; networks may be attached on top of each other.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .adapters import ADAPTERS, Adapter, LoRA, SplitLoRA
from .keys import kohya_name
from .layers import LayerShape
from .spec import NetworkSpec
from .targets import Candidate, parameter_shapes


class Network(nn.Module):
    """The trainable adapter as a whole: one Adapter for each adapted layer.

    The base layers are not held: the same network fits any clone of the model it was built for.
    """

    def __init__(self, adapters: Mapping[str, Adapter], spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.layer_names = tuple(adapters)
        """Dotted names from the root of the diffusion model, in the model's order."""
        self.adapters = nn.ModuleDict(
            {kohya_name(name): adapter for name, adapter in adapters.items()}
        )
        if len(self.adapters) != len(adapters):
            raise ValueError("two adapted layers have the same name once '.' becomes '_'")

    def items(self) -> Iterator[tuple[str, Adapter]]:
        """(dotted layer name, adapter), in the model's order."""
        return zip(self.layer_names, self.in_order(), strict=True)

    def in_order(self) -> list[Adapter]:
        """Every adapter, in the model's order."""
        return cast(list[Adapter], list(self.adapters.values()))

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """The dtype in which deltas are computed; None: that of the parameters."""
        for adapter in self.in_order():
            adapter.compute_dtype = dtype


def build_network(
    targets: tuple[Candidate, ...],
    spec: NetworkSpec,
    seed: int,
    compute_dtype: torch.dtype | None = None,
) -> Network:
    """Adapters for `targets` (`TargetReport.selected`), on the CPU, float32, in training mode.

    The same targets, spec and seed give the same parameters on every machine. To be trained, build
    it outside `torch.inference_mode()`.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for target in targets:
        adapters[target.name] = build_adapter(target.shape, spec, target.rows)
        adapters[target.name].reset_parameters(generator)
    network = Network(adapters, spec)
    network.set_compute_dtype(compute_dtype)
    return network


def build_adapter(shape: LayerShape, spec: NetworkSpec, rows: tuple[int, ...] = ()) -> Adapter:
    """One adapter with uninitialised parameters; `rows` as in Candidate."""
    rank, alpha = spec.rank_and_alpha(large_kernel=shape.has_large_kernel)
    sizes = parameter_shapes(shape, spec, rows)
    build = partial(SplitLoRA, rows=rows) if rows else ADAPTERS[spec.kind]
    return build(
        shape,
        {name: torch.empty(size) for name, size in sizes.items()},
        alpha=alpha,
        rank=rank,
        neuron_dropout=spec.neuron_dropout,
        rank_dropout=spec.rank_dropout,
        module_dropout=spec.module_dropout,
    )


@contextmanager
def attached(model: nn.Module, network: Network) -> Iterator[None]:
    """Inside, the layers of `model` (the diffusion model) return base + delta.

    The model is left exactly as it was on every way out. ValueError when it lacks a layer.
    """
    layers = dict(model.named_modules())
    missing = [name for name in network.layer_names if name not in layers]
    if missing:
        raise ValueError(
            f"the network was built for another model: {len(missing)} of its "
            f"{len(network.layer_names)} layers are not in this one, such as {missing[0]!r}"
        )
    handles: list[RemovableHandle] = []
    try:
        for name, adapter in network.items():
            handles.append(layers[name].register_forward_hook(_adding(adapter)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(adapter: Adapter) -> Callable[..., Tensor]:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return adapter.add_to(output, inputs[0])

    return add


def parameter_groups(network: Network, learning_rate: float) -> list[dict[str, object]]:
    """Optimizer groups {params, lr, name}; with LoRA+ "unet" and "unet plus" (the up matrices).

    LoRA+, arXiv 2402.12354: up learns `loraplus_lr_ratio` times faster. Names as musubi logs them.
    """
    ratio = network.spec.loraplus_lr_ratio
    loras = [adapter for adapter in network.in_order() if isinstance(adapter, LoRA)]
    if ratio is None or not loras:
        return [{"params": list(network.parameters()), "lr": learning_rate, "name": "unet"}]
    return [
        {
            "params": [lora.down for lora in loras],
            "lr": learning_rate,
            "name": "unet",
        },
        {"params": [lora.up for lora in loras], "lr": learning_rate * ratio, "name": "unet plus"},
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightNorms:
    """What `scale_weight_norms` did; tensors on the network's device, so nothing waits for it."""

    scaled: Tensor
    """Number of LoRAs whose weights were scaled down; 0-d int64."""
    norms: Tensor
    """Frobenius norm of ΔW of every LoRA afterwards, (LoRAs,) float32."""


@torch.no_grad()
def scale_weight_norms(network: Network, limit: float) -> WeightNorms:
    """Scale down, in place, every LoRA whose ‖ΔW‖ exceeds `limit` (kohya's --scale_weight_norms).

    n = ‖up·down·alpha/rank‖_F; where it exceeds the limit, both matrices are multiplied by the
    square root of limit / n. Each part of a split layer is a LoRA of its own.
    """
    check_weight_norms(network, limit)
    loras = [adapter for adapter in network.in_order() if isinstance(adapter, LoRA)]
    pairs = [(up, down, lora.scale) for lora in loras for up, down in lora.pairs()]
    norms = torch.stack([_frobenius_norm(up, down) * scale for up, down, scale in pairs])
    clamped = norms.clamp(min=limit / 2)  # a fresh network does not divide by zero
    ratio = clamped.clamp(max=limit) / clamped
    for (up, down, _), factor in zip(pairs, ratio.sqrt().unbind(), strict=True):
        down.mul_(factor)
        up.mul_(factor)
    return WeightNorms(scaled=(ratio != 1).sum(), norms=norms * ratio)


def check_weight_norms(network: Network, limit: float) -> None:
    """ValueError when `scale_weight_norms` cannot limit this kind of network."""
    if network.spec.kind != "lora":
        raise ValueError(
            f"scale_weight_norms={limit}: works on lora only, not on {network.spec.kind}; use 0"
        )


def _frobenius_norm(up: Tensor, down: Tensor) -> Tensor:
    """‖up·down‖_F as √tr((upᵀup)(down·downᵀ)): no matrix of the size of the product."""
    up, down = up.flatten(1), down.flatten(1)
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
