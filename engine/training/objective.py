"""What the network learns: noised latents, the model's own target, the loss of each sample."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor


class Denoiser(Protocol):
    """A diffusion model as the loop sees it; the one place of dependency inversion.

    t is (B,) in [0, 1], 1 = pure noise; latents and noise are (B, C, [T], H, W).
    """

    def noised_input(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The latents at noise level t, float32."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should answer (velocity, noise or v), float32."""
        ...

    def raw_output(self, noised: Tensor, t: Tensor, conditioning: Sequence[Any]) -> Tensor:
        """What the model answers, float32, differentiable with respect to the network."""
        ...


ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
}


def sample_losses(prediction: Tensor, target: Tensor, loss_type: str = "mse") -> Tensor:
    """Loss of each sample (B,), the mean over its elements, in float32."""
    losses = ELEMENTWISE[loss_type](prediction.float(), target.float(), reduction="none")
    return losses.flatten(1).mean(dim=1)


def denoising_losses(
    denoiser: Denoiser,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    conditioning: Sequence[Any],
    loss_type: str = "mse",
) -> Tensor:
    """Loss of each sample (B,) at its noise level `t` (B,): noise, prediction, target, loss."""
    prediction = denoiser.raw_output(denoiser.noised_input(latents, noise, t), t, conditioning)
    return sample_losses(prediction, denoiser.target(latents, noise, t), loss_type)
