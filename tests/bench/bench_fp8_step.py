"""A training step on a frozen FP8 base and on the same base in bf16: time and bytes for backward.

    python tests/bench/bench_fp8_step.py [--rounds 7] [--layers 6]

One process, one thread, variants interleaved round by round, CPU seconds of the process, medians.
ComfyUI's own Linears, 2048², with a rank-16 LoRA beside each and SiLU between, bf16, through
Braid's frozen base; "kept copy" is the same FP8 base under plain autograd, which keeps what the
forward dequantised (musubi-tuner's patched forward). Bytes are distinct storages that autograd
saves, the base left out.
"""

import argparse
import contextlib
import platform
import statistics
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "comfyui")]
import conftest  # noqa: E402, F401  registers the package
from host.inprocess import import_comfyui  # noqa: E402

if not import_comfyui():
    sys.exit("no ComfyUI found: set COMFYUI_PATH")

import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from comfyui_braid.engine.comfyui.differentiable.frozen import dequantized, frozen  # noqa: E402
from comfyui_braid.engine.comfyui.fp8.layout import with_fine_scale  # noqa: E402
from comfyui_braid.engine.fp8.model_file import comfy_quant, core_format  # noqa: E402
from comfyui_braid.engine.fp8.policy import Fp8Policy  # noqa: E402
from comfyui_braid.engine.fp8.stream import quantize_weight  # noqa: E402

WIDTH, RANK = 2048, 16
TOKENS = (256, 1024)
CPU = torch.device("cpu")


def base_layers(count: int, policy: Fp8Policy | None) -> nn.ModuleList:
    """ComfyUI's mixed-precision Linears: bf16, or FP8 by `policy`, as the loader makes them."""
    operations = comfy.ops.mixed_precision_ops({}, torch.bfloat16, full_precision_mm=True)
    layers = nn.ModuleList()
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        linear = operations.Linear(WIDTH, WIDTH, bias=False)
        weight = torch.randn(WIDTH, WIDTH, generator=generator).mul_(WIDTH**-0.5).bfloat16()
        if policy is None:
            linear.load_state_dict({"weight": weight})
        else:
            made = quantize_weight(weight, policy, CPU)
            state = {
                "weight": made.codes,
                "weight_scale": made.scale,
                "comfy_quant": comfy_quant(core_format(made.codes.dtype)),
            }
            linear.load_state_dict(state, strict=False)
            if made.scale.ndim:
                fine = with_fine_scale(linear.weight)
                linear.weight = nn.Parameter(fine, requires_grad=False)
        layers.append(linear)
    return layers


class Stack(nn.Module):
    """Base layers with a LoRA beside each."""

    def __init__(self, base: nn.ModuleList) -> None:
        super().__init__()
        self.base = base
        self.down = nn.ParameterList(torch.randn(RANK, WIDTH).bfloat16() * 0.01 for _ in base)
        self.up = nn.ParameterList(torch.zeros(WIDTH, RANK).bfloat16() for _ in base)

    def forward(self, x):
        for linear, down, up in zip(self.base, self.down, self.up, strict=True):
            x = nn.functional.silu(linear(x) + x @ down.t() @ up.t())
        return x


class KeptCopy(nn.Module):
    """One FP8 layer whose dequantised weight is what autograd saves."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x):
        weight = self.linear.weight
        codes, scale = weight._qdata, weight._params.scale.to(x.dtype)
        groups = (scale.shape[1],) if scale.ndim == 3 else ()
        dense = (codes.to(x.dtype).view(WIDTH, *groups, -1) * scale).view(WIDTH, WIDTH)
        return x @ dense.t()


def step(stack: nn.Module, x: torch.Tensor) -> None:
    stack(x).square().mean().backward()
    for parameter in (*stack.down, *stack.up):
        parameter.grad = None


def saved_bytes(stack: nn.Module, x: torch.Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in (*stack.down, *stack.up, x)}
    sizes = {}

    def pack(tensor):
        storage = dequantized(tensor) if hasattr(tensor, "_qdata") else tensor
        storage = storage.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stack(x).square().mean().backward()
    return sum(sizes.values())


def variants(count: int):
    yield "bf16 base", Stack(base_layers(count, None)), True
    for granularity in ("block", "channel", "tensor"):
        policy = Fp8Policy(granularity=granularity)
        yield f"FP8 {granularity}", Stack(base_layers(count, policy)), True
    kept = nn.ModuleList(KeptCopy(layer) for layer in base_layers(count, Fp8Policy()))
    yield "FP8 block, kept copy", Stack(kept), False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    comfy.model_management.in_training = True
    stacks = list(variants(arguments.layers))
    print(f"{platform.machine()}, torch {torch.__version__}, {arguments.layers} layers, one thread")
    for tokens in TOKENS:
        x = torch.randn(tokens, WIDTH).bfloat16().requires_grad_(True)
        times: dict[str, list[float]] = {name: [] for name, _, _ in stacks}
        saved = {}
        for round_ in range(arguments.rounds + 1):
            for name, stack, is_frozen in stacks:
                with frozen(stack.base) if is_frozen else contextlib.nullcontext():
                    if round_ == 0:
                        saved[name] = saved_bytes(stack, x)
                        continue
                    start = time.process_time()
                    step(stack, x)
                    times[name].append(time.process_time() - start)
        base = statistics.median(times["bf16 base"])
        print(f"\n{tokens} tokens{'':16s} {'ms / layer':>10s} {'/ bf16':>7s} {'saved / bf16':>13s}")
        for name in times:
            median = statistics.median(times[name])
            per_layer = 1e3 * median / arguments.layers
            ratio, bytes_ratio = median / base, saved[name] / saved["bf16 base"]
            print(f"{name:26s} {per_layer:10.2f} {ratio:7.2f} {bytes_ratio:13.2f}")


if __name__ == "__main__":
    main()
