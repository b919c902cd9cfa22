"""The playground model as the training loop's Denoiser, without ComfyUI."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .captions import embed_caption
from .model import Flux


class PlaygroundDenoiser:
    """Rectified flow: x_t = (1 - t) latents + t noise, the model answers noise - latents.

    Latents are in the model's own scale; the conditioning of an item is its caption.
    """

    def __init__(self, model: Flux) -> None:
        self.model = model

    def noised_input(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return latents + t.view(-1, 1, 1, 1) * (noise - latents)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - latents

    def raw_output(self, noised: Tensor, t: Tensor, conditioning: Sequence[str]) -> Tensor:
        context, pooled = zip(*(embed_caption(caption) for caption in conditioning), strict=True)
        return self.model(noised, t, torch.cat(context), torch.cat(pooled))
