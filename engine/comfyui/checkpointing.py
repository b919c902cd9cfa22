"""Exact gradient checkpointing over blocks that change their inputs in place.

A checkpointed block keeps only its inputs and is run a second time in backward. ComfyUI's blocks add
to their residual stream in place and return it, which torch's own checkpointing answers with wrong
gradients, in silence. Here the block always works on clones, in forward and again in backward, so
that what was saved stays what it was, and autograd still checks that nobody else has changed it.

Adapters are reached through the block's own modules: their gradients are accumulated by the
backward pass that runs inside the block's.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .frozen import forward_replaced

Rebuild = Callable[[Sequence[Tensor]], Any]
"""Puts tensors back into the structure they were taken from."""


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[int]:
    """Checkpoint every block of `model` while entered; yields how many blocks were found."""
    blocks = find_blocks(model)
    running = _Running()
    with ExitStack() as undo:
        for block in blocks:
            forward = _checkpointing_forward(block, block.forward, running)
            undo.enter_context(forward_replaced(block, forward))
        yield len(blocks)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of `model`: what stands in its module lists and has parts of its own.

    Where a list holds sequences, which their model may call part by part (UNets do), the parts of a
    sequence count too; a block inside a running block is never checkpointed a second time.
    """
    found: dict[nn.Module, None] = {}
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for block in module:
            for part in [block, *block] if isinstance(block, nn.Sequential) else [block]:
                if next(part.children(), None) is not None and not isinstance(part, nn.ModuleList):
                    found[part] = None
    return list(found)


@dataclass(slots=True)
class _Running:
    """Whether a checkpointed block is being run, so that those inside it run plainly."""

    inside: bool = False

    @contextmanager
    def block(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


def _checkpointing_forward(
    block: nn.Module, forward: Callable[..., Any], running: _Running
) -> Callable[..., Any]:
    def checkpointing_forward(*args: Any, **kwargs: Any) -> Any:
        if running.inside or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        tensors: list[Tensor] = []
        rebuild = _flatten((args, kwargs), tensors)
        if not any(tensor.requires_grad for tensor in tensors) and not _has_hooks(block):
            return forward(*args, **kwargs)  # before the first adapter: nothing to track

        def run(inputs: Sequence[Tensor]) -> Any:
            args, kwargs = rebuild(inputs)
            with running.block():
                return forward(*args, **kwargs)

        outputs = _Outputs()
        flat = _Checkpoint.apply(torch.empty(0, requires_grad=True), run, outputs, *tensors)
        return outputs.rebuild(flat)

    return checkpointing_forward


def _has_hooks(block: nn.Module) -> bool:
    """Whether anything, such as an adapter, hangs on a module of `block`."""
    return any(module._forward_hooks for module in block.modules())


@dataclass(slots=True)
class _Outputs:
    """How to put a block's output tensors back into the structure that it returned."""

    rebuild: Rebuild = tuple


class _Checkpoint(torch.autograd.Function):
    """One block. The first input only makes the outputs require a gradient."""

    @staticmethod
    def forward(
        ctx, anchor: Tensor, run: Callable[..., Any], outputs: _Outputs, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # an output nobody used must not give its parts zeros
        ctx.run = run
        ctx.rng = _RandomState.of(tensors)
        ctx.save_for_backward(*tensors)
        results: list[Tensor] = []
        outputs.rebuild = _flatten(run([tensor.clone() for tensor in tensors]), results)
        # a view made in here could not be changed in place out there
        results = [result.clone() if result._is_view() else result for result in results]
        ctx.mark_non_differentiable(*[r for r in results if not r.is_floating_point()])
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        leaves = [
            tensor.detach().requires_grad_(needs)
            for tensor, needs in zip(ctx.saved_tensors, needed, strict=True)
        ]
        results: list[Tensor] = []
        with torch.enable_grad(), ctx.rng.restored():
            _flatten(ctx.run([leaf.clone() for leaf in leaves]), results)
        pairs = [
            (result, grad)
            for result, grad in zip(results, grads, strict=True)
            if grad is not None and result.requires_grad
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        return None, None, None, *(leaf.grad for leaf in leaves)


@dataclass(frozen=True, slots=True)
class _RandomState:
    """The random state at the start of a block, so that dropout drops the same again."""

    cpu: Tensor
    devices: dict[torch.device, Tensor]
    """State by accelerator; empty on a CPU."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "_RandomState":
        devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
        return cls(torch.get_rng_state(), {d: _module_of(d).get_rng_state(d) for d in devices})

    @contextmanager
    def restored(self) -> Iterator[None]:
        now = _RandomState.of([torch.empty(0, device=device) for device in self.devices])
        self._set()
        try:
            yield
        finally:
            now._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            _module_of(device).set_rng_state(state, device)


def _module_of(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _flatten(value: Any, tensors: list[Tensor]) -> Rebuild:
    """Append the tensors in `value` to `tensors`; returns what rebuilds `value` around others.

    Looks into tuples, lists, dicts and small objects that hold tensors (FLUX's modulation). Anything
    else is passed on as it is, but a dict is copied: models go on writing into the
    `transformer_options` they hand to each block.
    """
    if isinstance(value, Tensor):
        index = len(tensors)
        tensors.append(value)
        return lambda inputs: inputs[index]
    if isinstance(value, (tuple, list)):
        parts = [_flatten(part, tensors) for part in value]
        build = type(value)._make if hasattr(value, "_make") else type(value)
        return lambda inputs: build(part(inputs) for part in parts)
    if isinstance(value, dict):
        items = {key: _flatten(part, tensors) for key, part in value.items()}
        return lambda inputs: {key: part(inputs) for key, part in items.items()}
    if _holds_tensors(value):
        fields = {name: _flatten(part, tensors) for name, part in vars(value).items()}
        return lambda inputs: _copy_with(value, {k: part(inputs) for k, part in fields.items()})
    return lambda inputs: value


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
        return False
    return (is_dataclass(value) or type(value).__module__.startswith("comfy.")) and any(
        isinstance(part, Tensor) for part in vars(value).values()
    )


def _copy_with(value: Any, fields: dict[str, Any]) -> Any:
    changed = copy.copy(value)
    vars(changed).update(fields)
    return changed
