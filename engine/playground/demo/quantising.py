"""Chapter 4: the model's weights in FP8, five ways, and what that does to its pictures."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from ...fp8.dequantize import dequantize
from ...fp8.policy import Fp8Policy
from ...fp8.stream import quantize_weight
from ..glyphs import LETTERS
from ..model import Flux
from ..sampling import sample
from .report import Section

BLOCKS = ("double_blocks", "single_blocks")
POLICIES = {
    "one scale per tensor": Fp8Policy(granularity="tensor"),
    "per output channel": Fp8Policy(granularity="channel"),
    "per block of 64": Fp8Policy(granularity="block"),
    "per block of 64, mse search": Fp8Policy(granularity="block", scale_search="mse"),
}


def quantising_section(model: Flux) -> Section:
    exact = sample(model, LETTERS, seed=5)
    rows = [["", "weight error", "picture error against bf16 weights"]]
    quantised, error = _plainly_cast(model)
    rows.append(
        ["plain cast, no scale", f"{error:.2%}", decibel(sample(quantised, LETTERS, seed=5), exact)]
    )
    for title, policy in POLICIES.items():
        quantised, error = _quantised(model, policy)
        rows.append([title, f"{error:.2%}", decibel(sample(quantised, LETTERS, seed=5), exact)])
    return Section(
        title="FP8 scaled weights",
        text="Every Linear of the double and single blocks held in float8_e4m3fn. The error of "
        "the weights is relative RMS; that of the pictures is PSNR of the latents, more is "
        "better.",
        table=rows,
    )


def _quantised(model: Flux, policy: Fp8Policy) -> tuple[Flux, float]:
    """A copy computing with dequantised FP8 weights, and their relative RMS error."""

    def through_fp8(weight: torch.Tensor) -> torch.Tensor:
        quantized = quantize_weight(weight, policy, weight.device)
        return dequantize(quantized.codes, quantized.scale, torch.float32)

    return _mapped(model, through_fp8)


def _plainly_cast(model: Flux) -> tuple[Flux, float]:
    return _mapped(model, lambda weight: weight.to(torch.float8_e4m3fn).float())


def _mapped(model: Flux, through: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Flux, float]:
    copied = copy.deepcopy(model)
    error = power = 0.0
    for name, layer in copied.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith(BLOCKS):
            rounded = through(layer.weight.data)
            error += float((rounded - layer.weight.data).square().sum())
            power += float(layer.weight.data.square().sum())
            layer.weight.data = rounded
    return copied, (error / power) ** 0.5


def decibel(latents: torch.Tensor, exact: torch.Tensor) -> str:
    """PSNR over the range of `exact`."""
    mean_square = float((latents - exact).square().mean())
    peak = float(exact.max() - exact.min())
    return f"{10 * torch.log10(torch.tensor(peak**2 / mean_square)).item():.1f} dB"
