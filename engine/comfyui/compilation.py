"""torch.compile of a model's blocks while it trains; the MODEL of the graph is left as it was."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..training.options import Compilation
from .checkpointing import find_blocks

logger = logging.getLogger("comfyui_braid.training")


@contextmanager
def compiled(diffusion_model: nn.Module, compilation: Compilation | None) -> Iterator[None]:
    """Inside, each block runs through torch.compile; where that fails, eager with a warning.

    Blocks are compiled one by one, as musubi does: one small graph serves all of them.
    """
    if compilation is None:
        yield
        return
    _check_backend(compilation.dynamo_backend)
    blocks = list(find_blocks(diffusion_model))
    before = torch._dynamo.config.suppress_errors
    torch._dynamo.config.suppress_errors = not compilation.dynamo_fullgraph
    originals = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = _compiled_forward(block.forward, compilation)
        yield
    finally:
        torch._dynamo.config.suppress_errors = before
        for block, original in zip(blocks, originals, strict=True):
            if original is None:
                vars(block).pop("forward", None)
            else:
                block.forward = original


def _compiled_forward(forward, compilation: Compilation):
    fast = torch.compile(
        forward,
        backend=compilation.dynamo_backend,
        mode=None if compilation.dynamo_mode == "default" else compilation.dynamo_mode,
        fullgraph=compilation.dynamo_fullgraph,
        dynamic=compilation.dynamo_dynamic,
    )
    broken = []

    def run(*args, **kwargs):
        if broken:
            return forward(*args, **kwargs)
        try:
            return fast(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            broken.append(error)
            logger.warning("torch.compile failed (%s); this block trains without it", error)
            return forward(*args, **kwargs)

    return run


def _check_backend(name: str) -> None:
    known = torch._dynamo.list_backends(exclude_tags=())
    if name not in known:
        raise ValueError(f"dynamo_backend is {name!r}; this torch has {', '.join(sorted(known))}")
