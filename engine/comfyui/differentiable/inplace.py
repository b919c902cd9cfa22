"""What to do about models that change in place what autograd has saved.

Autograd never gets this wrong in silence: it compares version counters and raises. `frozen`
removes the common case, residual streams, at the price of one copy per norm. Any other is found by
a trial backward pass once, and then met by torch's own `allow_mutation_on_saved_tensors`, which is
exact too but looks at every operation.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

guarded = torch.autograd.graph.allow_mutation_on_saved_tensors
"""Context manager for forward and backward in which in-place changes are exact; does not nest."""


def is_guarded() -> bool:
    """Whether `guarded`, or any other mode that looks at every operation, is entered."""
    return is_in_torch_dispatch_mode()


def differentiates(outputs: Sequence[Tensor]) -> bool:
    """Whether autograd can walk from `outputs` back to every leaf; changes no `.grad`.

    False where something that it saved was changed in place since. The graph stays usable.
    """
    outputs = [output for output in outputs if output.requires_grad]
    leaves = list(_leaves(outputs))
    if not leaves:
        return True
    zeros = [torch.zeros_like(output) for output in outputs]
    try:
        torch.autograd.grad(outputs, leaves, zeros, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return False
    return True


def _leaves(outputs: Iterable[Tensor]) -> Iterable[Tensor]:
    """The tensors whose gradient a backward pass from `outputs` would accumulate."""
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
