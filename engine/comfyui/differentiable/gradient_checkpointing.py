"""Exact gradient checkpointing over blocks that change their inputs in place.

A recomputing block keeps only its inputs and is run a second time in backward. ComfyUI's blocks
add to their residual stream in place and return it, which torch's own checkpointing answers with
wrong gradients, in silence. Here the block always works on clones, in forward and again in
backward, so that what was saved stays what it was, and autograd still checks that nobody else has
changed it.

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
from .inplace import differentiates, guarded

Rebuild = Callable[[Sequence[Tensor]], Any]
"""Puts tensors back into the structure they were taken from."""


@contextmanager
def recomputing(model: nn.Module) -> Iterator[int]:
    """Let every block of `model` recompute while entered; yields how many blocks were found."""
    blocks = find_blocks(model)
    running = _Running()
    with ExitStack() as undo:
        for block in blocks:
            forward = _Block(block, block.forward, running)
            undo.enter_context(forward_replaced(block, forward))
        yield len(blocks)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of `model`: what stands in its module lists and has parts of its own.

    Where a list holds sequences, which their model may call part by part (UNets do), the parts of a
    sequence count too; a block inside a running block recomputes with it.
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


def outermost(blocks: list[nn.Module]) -> list[nn.Module]:
    """Blocks that are not part of another one."""
    inner = {part for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if block not in inner]


def graphs_alive(model: nn.Module, gradient_checkpointing: bool) -> float:
    """Memory of a training step's activations over the host's estimate for one forward pass.

    Counted, not measured: the host reserves about 1 GB for FLUX at 1024 x 1024 in bfloat16; one of
    its 57 blocks saves about 20 tensors of tokens x width, half a gigabyte, and a recomputing
    one keeps its two inputs.
    """
    return 3 if gradient_checkpointing else 3 + len(outermost(find_blocks(model))) / 2


@dataclass(slots=True)
class _Running:
    """Whether a recomputing block is being run, so that those inside it run plainly."""

    inside: bool = False


@dataclass(slots=True)
class _Block:
    """The forward of one block that recomputes."""

    module: nn.Module
    forward: Callable[..., Any]
    running: _Running
    proven: bool = False
    """Whether plain autograd was seen to walk back through it."""
    guarded: bool = False
    """Whether plain autograd was seen not to: the block changes in place what it has saved."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.running.inside or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        tensors: list[Tensor] = []
        rebuild = _flatten((args, kwargs), tensors)
        if not any(tensor.requires_grad for tensor in tensors) and not self._has_hooks():
            return self.forward(*args, **kwargs)  # before the first adapter: nothing to track
        call = _Call(self, rebuild)
        outputs = _Recomputed.apply(torch.empty(0, requires_grad=True), call, *tensors)
        return call.rebuild_outputs(outputs)

    def _has_hooks(self) -> bool:
        """Whether anything, such as an adapter, hangs on a part of the block."""
        return any(module._forward_hooks for module in self.module.modules())


@dataclass(slots=True)
class _Call:
    """One use of a block in a forward pass."""

    block: _Block
    rebuild_inputs: Rebuild
    rebuild_outputs: Rebuild = tuple

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The block's outputs for its inputs `tensors`, which may be changed in place."""
        args, kwargs = self.rebuild_inputs(tensors)
        running = self.block.running
        results: list[Tensor] = []
        before, running.inside = running.inside, True
        try:
            self.rebuild_outputs = _flatten(self.block.forward(*args, **kwargs), results)
        finally:
            running.inside = before
        return results


class _Recomputed(torch.autograd.Function):
    """A call without its graph. The first input only makes the outputs require a gradient."""

    @staticmethod
    def forward(ctx, anchor: Tensor, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # an output nobody used must not give its parts zeros
        ctx.call = call
        ctx.rng = _RandomState.of(tensors)
        ctx.save_for_backward(*tensors)
        results = call.run([tensor.clone() for tensor in tensors])
        # a view made in here could not be changed in place out there
        results = [result.clone() if result._is_view() else result for result in results]
        ctx.mark_non_differentiable(*[r for r in results if not r.is_floating_point()])
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]

        def outputs() -> list[Tensor]:
            with torch.enable_grad(), ctx.rng.restored():
                return ctx.call.run([tensor.clone() for tensor in inputs])

        block = ctx.call.block
        if not block.guarded:
            results = outputs()
            block.proven = block.proven or differentiates(results)
            block.guarded = not block.proven
        if block.guarded:
            with guarded():
                _accumulate(outputs(), grads)
        else:
            _accumulate(results, grads)
        return None, None, *(tensor.grad for tensor in inputs)


def _accumulate(outputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """The backward pass of one block, down to its inputs and to the adapters in it."""
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if grad is not None and output.requires_grad
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])


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

    Looks into tuples, lists, dicts and small objects that hold tensors (FLUX's modulation).
    Anything else is passed on as it is, but a dict is copied: models go on writing into the
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
