"""torch.compile of a model's blocks while it trains; the MODEL of the graph is left as it was."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import nn

from ..training.loop import TrainingRun, TrainingStep
from ..training.options import Compilation
from .checkpointing import find_blocks
from .frozen import forward_replaced

logger = logging.getLogger("comfyui_braid.training")


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

    def turn_off(self, error: Exception) -> None:
        """Run every block as it is from now on."""
        self.failure = f"torch.compile failed ({type(error).__name__}: {error})"
        logger.warning("%s; the run goes on without it", self.failure)

    def forward(self, plain: Callable[..., Any], compilation: Compilation) -> Callable[..., Any]:
        """`plain` through torch.compile, while that is on and gradients are wanted."""
        fast = torch.compile(
            plain,
            backend=compilation.dynamo_backend,
            mode=None if compilation.dynamo_mode == "default" else compilation.dynamo_mode,
            fullgraph=compilation.dynamo_fullgraph,
            dynamic=compilation.dynamo_dynamic,
        )

        def forward(*args: Any, **kwargs: Any) -> Any:
            # the host samples previews in inference mode: other code, not worth compiling
            compile_it = self.is_on and not torch.is_inference_mode_enabled()
            return (fast if compile_it else plain)(*args, **kwargs)

        return forward


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
    blocks = _outermost(find_blocks(model))
    with ExitStack() as undo:
        # each block is traced by itself; torch gives up after 8 of a kind
        limit = max(torch._dynamo.config.cache_size_limit, 4 * len(blocks))
        undo.enter_context(torch._dynamo.config.patch(cache_size_limit=limit))
        for block in blocks:
            forward = result.forward(block.forward, compilation)
            undo.enter_context(forward_replaced(block, forward))
        result.blocks = len(blocks)
        yield result


def compiled_steps(run: TrainingRun, compilation: Compiled) -> Iterator[TrainingStep]:
    """The run's steps; when the first ones fail while compiling is on, again without it."""
    try:
        yield from run.steps()
    except (comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not (compilation.is_on and _is_of_the_compiler(error)):
            raise
        compilation.turn_off(error)
        yield from run.steps()


def _is_of_the_compiler(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, was raised by torch.compile."""
    while error is not None:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _outermost(blocks: list[nn.Module]) -> list[nn.Module]:
    """Blocks that are not part of another one."""
    inner = {part for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if block not in inner]


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
