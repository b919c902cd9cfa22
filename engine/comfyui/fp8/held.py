"""What a loaded model holds in memory, whatever dtype its file or the policy had in mind.

ComfyUI casts what is not quantised to the dtype that it computes in: on a CPU to float32, twice
the size of a bf16 file's layers.
"""

from collections.abc import Iterator, Mapping

from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...fp8.report import Fp8Report


def report_as_held(
    report: Fp8Report, model: nn.Module, module_names: Mapping[str, str]
) -> Fp8Report:
    """`report` of a file with the bytes that `model`, the diffusion model, holds of it.

    module_names: name of a Linear in the file → its name in the model.
    """
    held = held_bytes(model)
    layers = {
        layer.name: held[key]
        for layer in report.layers
        if (key := f"{module_names.get(layer.name, layer.name)}.weight") in held
    }
    return report.as_held(layers, sum(held.values()))


def held_bytes(model: nn.Module) -> dict[str, int]:
    """Dotted name of every parameter and buffer → bytes of the storages that it holds.

    Of tensors that share a storage the first has it all.
    """
    seen: set[int] = set()
    held: dict[str, int] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        storages = {s.data_ptr(): s.nbytes() for s in map(Tensor.untyped_storage, plain(tensor))}
        held[name] = sum(size for place, size in storages.items() if place not in seen)
        seen |= storages.keys()
    return held


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor itself, or the codes, scales and so on of a quantised one."""
    if not isinstance(tensor, QuantizedTensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield getattr(tensor, name)  # never of tensor.data, whose scale is a copy
