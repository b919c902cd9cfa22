"""torch.compile of a model's blocks while it trains; the MODEL of the graph is left as it was."""

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import nn
from torch._functorch import config as functorch_config

from ...refusals import said
from ...training.loop import TrainingRun, TrainingStep
from ...training.options import Compilation
from .frozen import forward_replaced
from .gradient_checkpointing import find_blocks, outermost
from .inplace import is_guarded

logger = logging.getLogger("comfyui_braid.training")

COMPILER = ("torch._dynamo", "torch._inductor", "torch._functorch")


class Compiled:
    """The blocks that run through torch.compile, until something goes wrong with it."""

    def __init__(self) -> None:
        self.blocks = 0
        self.failure = ""

    @property
    def is_on(self) -> bool:
        return self.blocks > 0 and not self.failure

    @property
    def state(self) -> str:
        """For the report: how many blocks are compiled, or why none is."""
        return self.failure or (f"{self.blocks} blocks" if self.blocks else "no")

    def turn_off(self, reason: str) -> None:
        """Run every block as it is from now on."""
        self.failure = reason
        logger.warning("%s; the run goes on without it", reason)

    def forward(self, plain: Callable[..., Any], compilation: Compilation) -> Callable[..., Any]:
        """`plain` through torch.compile, while that is on and gradients are wanted."""

        def isolated(*args: Any, **kwargs: Any) -> Any:
            # What a block changes in place, other blocks have saved for backward. Compiled, the
            # copies cost nothing: the block computes into new memory anyway.
            kwargs = {name: _clone(value) for name, value in kwargs.items()}
            return plain(*[_clone(value) for value in args], **kwargs)

        fast = torch.compile(
            isolated,
            backend=compilation.dynamo_backend,
            mode=None if compilation.dynamo_mode == "default" else compilation.dynamo_mode,
            fullgraph=compilation.dynamo_fullgraph,
            dynamic=compilation.dynamo_dynamic,
        )

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.is_on and is_guarded():
                self.turn_off("torch.compile is off: this model changes what autograd has saved")
            # the host samples previews in inference mode: other code, not worth compiling
            compile_it = self.is_on and not torch.is_inference_mode_enabled()
            return (fast if compile_it else plain)(*args, **kwargs)

        return forward

    @contextmanager
    def savable_weights(self, model: nn.Module) -> Iterator[None]:
        """Inside, weights made under inference mode are plain tensors in the same memory.

        A compiled block remembers its weights for backward, and autograd refuses those.
        """
        with ExitStack() as undo:
            if self.is_on:
                for module in model.modules():
                    for name, weight in module._parameters.items():
                        if type(weight) is nn.Parameter and weight.is_inference():
                            alias = nn.Parameter(_alias(weight), requires_grad=False)
                            module._parameters[name] = alias
                            undo.callback(_put_back, module, name, weight, alias)
            yield


@contextmanager
def compiled(model: nn.Module, compilation: Compilation | None) -> Iterator[Compiled]:
    """Inside, each block of `model` runs through torch.compile; ValueError for a bad backend.

    Blocks are compiled one by one, as musubi does: a small graph each, whatever the model's size.
    """
    result = Compiled()
    if compilation is None:
        yield result
        return
    _check_backend(compilation)
    blocks = outermost(find_blocks(model))
    with ExitStack() as undo:
        config = torch._dynamo.config
        settings: dict[str, Any] = {
            # each block is traced by itself; torch gives up after 8 of a kind
            "cache_size_limit": max(config.cache_size_limit, 4 * len(blocks)),
            # adapters hang on hooks: code of a block without one must not serve a block with one
            "skip_nnmodule_hook_guards": False,
        }
        undo.enter_context(config.patch(**settings))
        if hasattr(functorch_config, "donated_buffer"):  # torch 2.6
            # the session tries backward once before the real one
            undo.enter_context(functorch_config.patch(donated_buffer=False))
        for block in blocks:
            forward = result.forward(block.forward, compilation)
            undo.enter_context(forward_replaced(block, forward))
        result.blocks = len(blocks)
        yield result


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _alias(weight: torch.Tensor) -> torch.Tensor:
    """A tensor that is no inference tensor, in the memory of `weight`."""
    alias = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return alias.set_(
        weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride()
    )


def _put_back(module: nn.Module, name: str, weight: nn.Parameter, alias: nn.Parameter) -> None:
    if module._parameters[name] is not alias:
        return  # the host has put another one there meanwhile
    if alias.data_ptr() != weight.data_ptr():  # the host has moved it
        with torch.inference_mode():
            weight.data = alias.data
    module._parameters[name] = weight


def compiled_steps(run: TrainingRun, compilation: Compiled) -> Iterator[TrainingStep]:
    """The run's steps; a step that fails for being compiled is made again without it."""
    started_at = run.step
    try:
        yield from run.steps()
    except (comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = run.step == started_at  # whatever broke it, it is worth trying without
        if not (compilation.is_on and (first or _is_of_the_compiler(error))):
            raise
        compilation.turn_off(f"torch.compile failed ({said(error)})")
        yield from run.steps()


def _is_of_the_compiler(error: BaseException) -> bool:
    """Whether `error` came out of torch.compile or of code that it made.

    Where it would come without compiling too, it comes again when the step is made again.
    """
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith(COMPILER) for frame, _ in frames)


def _check_backend(compilation: Compilation) -> None:
    known = torch._dynamo.list_backends(exclude_tags=())
    if compilation.dynamo_backend not in known:
        raise ValueError(
            f"dynamo_backend is {compilation.dynamo_backend!r}; this torch has "
            f"{', '.join(sorted(known))}"
        )
    if compilation.dynamo_mode != "default" and compilation.dynamo_backend != "inductor":
        raise ValueError(
            f"dynamo_mode {compilation.dynamo_mode} is for the backend inductor; set it to default "
            f"with {compilation.dynamo_backend}"
        )
