"""A fixed embedding per caption: what a text encoder would give, without one."""

import torch
from torch import Tensor

from .glyphs import LETTERS, caption_of

TOKENS, CONTEXT_DIM, POOLED_DIM = 4, 64, 32
EMBEDDING_SEED = 20240801


def embed_caption(caption: str) -> tuple[Tensor, Tensor]:
    """Context (1, 4, 64) and pooled (1, 32) of a caption; zeros for the empty one."""
    table = {caption_of(letter): index for index, letter in enumerate(LETTERS)}
    if caption == "":
        return torch.zeros(1, TOKENS, CONTEXT_DIM), torch.zeros(1, POOLED_DIM)
    if caption not in table:
        raise ValueError(f"unknown caption {caption!r}; the playground knows {', '.join(table)}")
    generator = torch.Generator().manual_seed(EMBEDDING_SEED + table[caption])
    context = torch.randn(1, TOKENS, CONTEXT_DIM, generator=generator)
    return context, torch.randn(1, POOLED_DIM, generator=generator)
