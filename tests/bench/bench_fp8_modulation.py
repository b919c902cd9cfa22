"""What 8 bits cost FLUX's modulation layers, which the FP8 presets keep: errors of outputs.

    OMP_NUM_THREADS=1 python tests/bench/bench_fp8_modulation.py [--width 3072] [--pictures 8]

Layers: relative RMS error of the output of one modulation layer (width → 6 × width, its input one
vector a picture, silu of a sum of embeddings with a few large dimensions) and of one attention
layer (width → 3 × width, its input normalised tokens), with normal and with heavy-tailed weights
(Student's t, 4 degrees of freedom). Models: relative RMS error of the velocity, mean over
pictures and t, on the playground's trained FLUX and on a random one of hidden 512. "x others" is
the error of modulation alone over that of all other block layers in FP8 with blocks of 64.
int8: symmetric, one scale per row or block, the largest value becomes 127.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import conftest  # noqa: E402, F401  registers the package
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from comfyui_braid.engine.fp8.dequantize import dequantize  # noqa: E402
from comfyui_braid.engine.fp8.policy import Fp8Policy  # noqa: E402
from comfyui_braid.engine.fp8.stream import quantize_weight  # noqa: E402
from comfyui_braid.engine.playground.glyphs import LETTERS  # noqa: E402
from comfyui_braid.engine.playground.model import Flux, FluxShape, load_playground  # noqa: E402
from comfyui_braid.engine.playground.sampling import embed_letters, sample  # noqa: E402

BLOCK = 64
TIMES = (0.95, 0.75, 0.5, 0.25, 0.05)
Through = Callable[[Tensor], Tensor]


def fp8(**policy: object) -> Through:
    def through(weight: Tensor) -> Tensor:
        quantized = quantize_weight(weight, Fp8Policy(**policy), weight.device)
        return dequantize(quantized.codes, quantized.scale, torch.float32)

    return through


def int8(group: int | None) -> Through:
    def through(weight: Tensor) -> Tensor:
        grouped = weight.view(weight.shape[0], -1, group or weight.shape[1])
        scale = grouped.abs().amax(-1, keepdim=True) / 127
        return ((grouped / scale).round() * scale).view(weight.shape)

    return through


FORMATS: dict[str, Through] = {
    "fp8 tensor": fp8(granularity="tensor"),
    "fp8 channel": fp8(granularity="channel"),
    "fp8 block": fp8(),
    "fp8 block, mse": fp8(scale_search="mse"),
    "int8 row": int8(None),
    "int8 block": int8(BLOCK),
}


def relative(values: Tensor, exact: Tensor) -> float:
    return ((values - exact).norm() / exact.norm()).item()


def weights(rows: int, columns: int, heavy: bool, generator: torch.Generator) -> Tensor:
    normal = torch.randn(rows, columns, generator=generator)
    if heavy:  # Student's t is a normal over the root of a chi-square
        squares = torch.stack(
            [torch.randn(rows, columns, generator=generator).square() for _ in range(4)]
        )
        normal = normal / squares.mean(0).sqrt()
    return 0.02 * normal / normal.std()


def layer_errors(width: int, pictures: int) -> None:
    print(f"\nlayers of width {width}: relative RMS error of the output, %")
    print(f"{'weights':<10} {'format':<16} {'modulation':>10} {'attention':>10}")
    for heavy in (False, True):
        generator = torch.Generator().manual_seed(0)
        size = torch.exp(torch.randn(width, generator=generator))  # a few large dimensions
        vectors = F.silu(torch.randn(pictures, width, generator=generator) * size)
        tokens = torch.randn(pictures * 16, width, generator=generator)
        modulation = weights(6 * width, width, heavy, generator)
        attention = weights(3 * width, width, heavy, generator)
        for title, through in FORMATS.items():
            errors = [
                relative(x @ through(w).T, x @ w.T)
                for x, w in ((vectors, modulation), (tokens, attention))
            ]
            shown = " ".join(f"{100 * error:>10.2f}" for error in errors)
            print(f"{'heavy' if heavy else 'normal':<10} {title:<16} {shown}")


def is_modulation(name: str) -> bool:
    return name.endswith(("_mod.lin", "modulation.lin"))


def rounded(model: Flux, modulation: Through | None, others: Through | None) -> Flux:
    copied = copy.deepcopy(model)
    for name, layer in copied.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith(("double_blocks", "single_blocks")):
            through = modulation if is_modulation(name) else others
            if through:
                layer.weight.data = through(layer.weight.data)
    return copied


@torch.inference_mode()
def velocity_error(model: Flux, exact: Flux, pictures: int) -> float:
    letters = LETTERS[:pictures]
    latents = sample(load_playground(), letters, seed=2)  # of the letters, also for another model
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    context, pooled = embed_letters(letters)
    errors = []
    for t in TIMES:
        noised = (1 - t) * latents + t * noise
        inputs = (noised, torch.full((len(letters),), t), context, pooled)
        errors.append(relative(model(*inputs), exact(*inputs)))
    return sum(errors) / len(errors)


def random_flux() -> Flux:
    """Hidden 512, weights of the size of the trained one's: gates that let the blocks through."""
    shape = FluxShape(hidden_size=512, rope_axes=(16, 56, 56))
    model = Flux(shape).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            size = (2.0 if "mod" in name else 1.0) / parameter.shape[1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        elif name.endswith("bias"):
            parameter.zero_()
    return model


def model_errors(title: str, model: Flux, pictures: int) -> None:
    block = FORMATS["fp8 block"]
    base = velocity_error(rounded(model, None, block), model, pictures)
    print(f"\n{title}: relative RMS error of the velocity, %")
    print(f"{'modulation':<16} {'alone':>7} {'x others':>9} {'with others':>12} {'x others':>9}")
    print(f"{'kept':<16} {0:>7.2f} {0:>9.2f} {100 * base:>12.2f} {1:>9.2f}")
    for name, through in FORMATS.items():
        alone = velocity_error(rounded(model, through, None), model, pictures)
        both = velocity_error(rounded(model, through, block), model, pictures)
        print(
            f"{name:<16} {100 * alone:>7.2f} {alone / base:>9.2f} "
            f"{100 * both:>12.2f} {both / base:>9.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--pictures", type=int, default=8)
    arguments = parser.parse_args()
    layer_errors(arguments.width, arguments.pictures)
    model_errors("playground, trained", load_playground(), arguments.pictures)
    model_errors("random, hidden 512", random_flux(), arguments.pictures)


if __name__ == "__main__":
    main()
