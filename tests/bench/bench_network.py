"""What adapters cost: a step with them over a step of the frozen layers alone.

    python tests/bench/bench_network.py

One thread, variants interleaved, the shortest CPU time of each (other programs of a busy machine do
not count); ratios within one run are what matters.
"""

import platform
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest  # noqa: E402, F401  (loads the pack)

from comfyui_braid.engine.network.architectures import DEFAULT  # noqa: E402
from comfyui_braid.engine.network.attach import attached, build_network  # noqa: E402
from comfyui_braid.engine.network.spec import NetworkSpec  # noqa: E402
from comfyui_braid.engine.network.targets import select_targets  # noqa: E402

ROUNDS = 12


class Stack(nn.Module):
    """Square Linear layers with a nonlinearity between, as the inside of a transformer block."""

    def __init__(self, layers: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(width, width, dtype=dtype)}) for _ in range(layers)
        )
        self.requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = torch.nn.functional.gelu(block["linear"](x))
        return x


@contextmanager
def by_override(model, network):
    """The alternative to hooks: an instance attribute `forward` on each layer."""
    layers = dict(model.named_modules())
    for name, adapter in network.items():
        layer = layers[name]
        layer.forward = lambda x, f=layer.forward, a=adapter: a.add_to(f(x), x)
    try:
        yield
    finally:
        for name, _ in network.items():
            del layers[name].forward


@contextmanager
def by_sum(model, network):
    """Hooks that add a separate delta, without the fused addmm."""
    layers = dict(model.named_modules())
    handles = [
        layers[name].register_forward_hook(
            lambda layer, inputs, output, a=adapter: output + a.delta(inputs[0])
        )
        for name, adapter in network.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def by_dense_weight(model, network):
    """A LoHa as others compute it: its full weight is formed and kept for backward."""
    layers = dict(model.named_modules())
    handles = [
        layers[name].register_forward_hook(
            lambda layer, inputs, output, a=adapter: (
                output + nn.functional.linear(inputs[0], a.delta_weight())
            )
        )
        for name, adapter in network.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def network_of(model, dtype, **spec):
    spec = NetworkSpec(**spec)
    network = build_network(select_targets(model, spec, DEFAULT).selected, spec, 0, dtype)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    return network


def step(model, x, context):
    x = x.detach().requires_grad_()
    with context:
        model(x).float().square().mean().backward()


def saved_bytes(model, x, context) -> int:
    """Bytes that autograd keeps between forward and backward, besides the model's own weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}
    x = x.detach().requires_grad_()

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), context:
        model(x)
    return sum(seen.values())


def compare(title, model, x, variants):
    times = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, make in variants.items():
            start = time.process_time()
            step(model, x, make())
            times[name].append(time.process_time() - start)
    first = min(times["frozen"])
    print(f"\n{title}: frozen step {1e3 * first:.1f} ms")
    for name, make in variants.items():
        ratio = min(times[name]) / first
        megabytes = saved_bytes(model, x, make()) / 2**20
        print(f"  {name:<28} {ratio:5.2f} x time   {megabytes:7.1f} MB saved for backward")


def variants_of(model: nn.Module, dtype: torch.dtype) -> dict:
    """Name → function that makes the context in which the model computes with adapters."""
    lora = network_of(model, dtype, rank=16)
    variants = {
        "frozen": nullcontext,
        "lora 16, hooks": partial(attached, model, lora),
        "lora 16, hooks, no addmm": partial(by_sum, model, lora),
        "lora 16, forward override": partial(by_override, model, lora),
    }
    if dtype == torch.float32:
        loha = network_of(model, dtype, rank=16, kind="loha")
        lokr = network_of(model, dtype, rank=16, kind="lokr")
        variants |= {
            "loha 16": partial(attached, model, loha),
            "loha 16, dense weight": partial(by_dense_weight, model, loha),
            "lokr 16": partial(attached, model, lokr),
        }
    return variants


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, 1 thread")
    for dtype in (torch.bfloat16, torch.float32):
        for width, tokens in ((2048, 512), (512, 264)):
            model = Stack(3, width, dtype)
            x = torch.randn(1, tokens, width, dtype=dtype)
            title = f"{dtype}, 3 x {width}², {tokens} tokens"
            compare(title, model, x, variants_of(model, dtype))
    hook_overhead()


def hook_overhead() -> None:
    """Microseconds that the mechanism itself costs on one call of a layer."""
    layer, x, calls = nn.Linear(8, 8), torch.randn(1, 8), 2000

    def timed() -> float:
        start = time.process_time()
        for _ in range(calls):
            layer(x)
        return (time.process_time() - start) / calls * 1e6

    plain, hooked, overridden = [], [], []
    for _ in range(ROUNDS):
        plain.append(timed())
        handle = layer.register_forward_hook(lambda module, inputs, output: output)
        hooked.append(timed())
        handle.remove()
        layer.forward = lambda x, f=layer.forward: f(x)
        overridden.append(timed())
        del layer.forward
    base = min(plain)
    print(
        f"\none call: plain {base:.1f} us, a hook adds {min(hooked) - base:.1f} us, "
        f"a forward override {min(overridden) - base:.1f} us"
    )


if __name__ == "__main__":
    main()
