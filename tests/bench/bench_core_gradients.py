"""How wrong gradients are through one checkpoint around the whole FLUX, as core's trainer has it.

    python tests/bench/bench_core_gradients.py

The playground's trained weights in float64, every weight trainable; exact gradients are those under
`torch.autograd.graph.allow_mutation_on_saved_tensors()`, which the suite checks against finite
differences.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402, F401
from host.inprocess import import_comfyui  # noqa: E402

if not import_comfyui():
    raise SystemExit("no ComfyUI found: set COMFYUI_PATH to a checkout")

import comfy.ldm.modules.attention as attention  # noqa: E402
import comfy.model_management  # noqa: E402
import torch  # noqa: E402
from torch.autograd.graph import allow_mutation_on_saved_tensors  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from comfyui_braid.engine.comfyui.playground import load_playground_model  # noqa: E402

OPTIONS = {"optimized_attention_override": lambda _, *a, **k: attention.attention_pytorch(*a, **k)}


def main() -> None:
    model = load_playground_model().model.diffusion_model.double().requires_grad_(True)
    torch.manual_seed(0)
    shapes = ((2, 16, 16, 16), (2,), (2, 4, 64), (2, 32))
    inputs = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    target = torch.randn(2, 16, 16, 16, dtype=torch.float64)

    def forward() -> torch.Tensor:
        return model(*inputs, transformer_options=dict(OPTIONS))

    def gradients(run) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (run() - target).square().mean().backward()
        named = model.named_parameters()
        return {n: p.grad.clone() for n, p in named if n.endswith("weight") and p.grad is not None}

    comfy.model_management.in_training = True
    try:
        gradients(forward)
        print("without checkpointing: no error")
    except RuntimeError as error:
        print(f"without checkpointing: {str(error)[:80]} …")
    with allow_mutation_on_saved_tensors():
        exact = gradients(forward)
    theirs = gradients(lambda: checkpoint(forward, use_reentrant=False))
    errors = sorted(float((theirs[n] - g).norm() / g.norm()) for n, g in exact.items() if g.any())
    print(
        f"one checkpoint around the model: relative error of {len(errors)} weight gradients: "
        f"median {statistics.median(errors):.1%}, largest {errors[-1]:.1%}"
    )


if __name__ == "__main__":
    main()
