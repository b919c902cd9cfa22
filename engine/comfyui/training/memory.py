"""Whether a run fits, estimated before its first step and refused with numbers when it cannot."""

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
import psutil
from comfy.model_patcher import ModelPatcher

from ..differentiable.gradient_checkpointing import graphs_alive

OPTIMIZER_BYTES_PER_PARAMETER = 4 + 4 + 8  # weight, gradient, two float32 moments
GIB = 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes a run needs at once."""

    weights: int
    adapter: int
    """Parameters, gradients, optimizer state and EMA shadows."""
    activations: int
    available: int
    """Free now, counting what ComfyUI can unload."""

    @property
    def needed(self) -> int:
        return self.weights + self.adapter + self.activations

    @property
    def text(self) -> str:
        parts = (
            f"{self.weights / GIB:.2f} GiB weights + {self.adapter / GIB:.2f} GiB adapter and "
            f"optimizer + {self.activations / GIB:.2f} GiB activations"
        )
        return f"{parts} = {self.needed / GIB:.2f} GiB, {self.available / GIB:.2f} GiB available"


def estimate_memory(
    patcher: ModelPatcher,
    *,
    parameters: int,
    batch_shape: Sequence[int],
    gradient_checkpointing: bool,
    shadows: int = 0,
    offload: bool = False,
) -> MemoryEstimate:
    """`parameters`: trainable numbers; `batch_shape`: the largest batch of latents (B, C, …).

    Activations are the host's own estimate of one forward pass times the number of block graphs
    that are alive at once. `shadows`: float32 copies of the adapter that are kept beside it.
    `offload`: the weights of the base stay in main memory.
    """
    forward = patcher.model.memory_required(list(batch_shape))
    graphs = graphs_alive(patcher.model.diffusion_model, gradient_checkpointing)
    management = comfy.model_management
    device = patcher.load_device
    if management.is_device_cpu(device):  # where the weights are in memory already
        available = psutil.virtual_memory().available + patcher.model_size()
    else:
        available = management.get_total_memory(device) - management.extra_reserved_memory()
    return MemoryEstimate(
        weights=0 if offload else int(patcher.model_size()),
        adapter=parameters * (OPTIMIZER_BYTES_PER_PARAMETER + 4 * shadows),
        activations=int(forward * graphs),
        available=int(available),
    )


def refuse_if_too_large(estimate: MemoryEstimate) -> None:
    """ValueError with the numbers when weights, adapter and activations cannot fit together."""
    if estimate.needed > estimate.available:
        raise ValueError(
            f"this run does not fit: {estimate.text}; lower batch_size or the resolution, turn on "
            "gradient_checkpointing, or set blocks_to_swap above 0"
        )
