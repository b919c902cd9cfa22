"""Euler sampling of the playground model in plain torch."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .captions import embed_caption
from .glyphs import LATENT_SIZE, caption_of, process_out

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, t, context, pooled) -> velocity, as `model.Flux.forward`."""


@torch.no_grad()
def sample(
    model: Velocity, letters: str, *, seed: int, steps: int = 20, cfg: float = 2.0
) -> Tensor:
    """One picture per letter, as latents (len(letters), 16, 16, 16) in the scale of FLUX's VAE.

    Euler steps over evenly spaced t from 1 to 0, with classifier-free guidance.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(letters), 16, LATENT_SIZE, LATENT_SIZE, generator=generator)
    context, pooled = embed_letters(letters)
    no_context, no_pooled = embed_letters([""] * len(letters))
    times = torch.linspace(1, 0, steps + 1)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        at = t.expand(len(letters))
        velocity = model(x, at, context, pooled)
        if cfg != 1.0:
            free = model(x, at, no_context, no_pooled)
            velocity = free + cfg * (velocity - free)
        x = x + (t_next - t) * velocity
    return process_out(x)


def embed_letters(letters: Iterable[str]) -> tuple[Tensor, Tensor]:
    """Context (B, 4, 64) and pooled (B, 32) of the captions of `letters`."""
    context, pooled = zip(*(embed_caption(caption_of(letter)) for letter in letters), strict=True)
    return torch.cat(context), torch.cat(pooled)
