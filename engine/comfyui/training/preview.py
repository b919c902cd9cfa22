"""Pictures sampled in the middle of a run, with the graph's own sampler, noise and VAE."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import numpy as np
import torch
from PIL import Image

from ...disk.writing import NotWrittenError, replaced_when_whole
from ...training.loop import TrainingRun, TrainingStep
from ..differentiable.denoiser import ComfyDenoiser

logger = logging.getLogger("comfyui_braid.training")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewSampling:
    """How a preview is sampled: objects of the host, as its sampler nodes take them."""

    latent: dict[str, Any]
    positive: list | None
    """None: that of the first training item."""
    negative: list | None
    sampler: Any | None
    """None: euler."""
    sigmas: torch.Tensor | None
    """None: the simple schedule of `steps`."""
    steps: int
    cfg: float
    seed: int
    vae: Any | None


class Previewer:
    """Samples the model as it is, shows the picture, saves it, gives everything back."""

    def __init__(
        self,
        every_n_steps: int,
        sampling: PreviewSampling,
        denoiser: ComfyDenoiser,
        default_positive: list,
        folder: Path,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.last: np.ndarray | None = None
        """(H, W, 3) in [0, 1]."""
        self._sampling = sampling
        self._patcher = denoiser.patcher
        self._default_positive = default_positive
        self._denoiser = denoiser
        self._folder = folder

    def draw(self, run: TrainingRun) -> None:
        """Sample after the step just done; what goes wrong there is a warning, not an end."""
        management = comfy.model_management
        run.network.eval()
        try:
            with (
                run.optimization.in_eval_mode(),
                torch.random.fork_rng([run.device] if run.device.type != "cpu" else []),
                self._denoiser.paused(),
            ):
                self.last = self._sample()
            self._save(self.last, run.step)
        except management.InterruptProcessingException:
            raise
        except Exception as error:  # of any sampler, VAE or other pack
            reason = "out of memory" if management.is_oom(error) else type(error).__name__
            logger.warning("no preview at step %d: %s (%s)", run.step, reason, error)
            management.soft_empty_cache()
        finally:
            run.network.train()

    def _sample(self) -> np.ndarray:
        sampling = self._sampling
        samples = comfy.sample.fix_empty_latent_channels(self._patcher, sampling.latent["samples"])
        noise = comfy.sample.prepare_noise(samples, sampling.seed, None)
        guider = comfy.samplers.CFGGuider(self._patcher)
        positive = sampling.positive or self._default_positive
        guider.set_conds(positive, sampling.negative or positive)
        guider.set_cfg(sampling.cfg if sampling.negative else 1.0)
        latents = guider.sample(
            noise,
            samples,
            sampling.sampler or comfy.samplers.sampler_object("euler"),
            self._sigmas(),
            disable_pbar=True,
            seed=sampling.seed,
        )
        return self._pictures(latents)[0].float().clamp(0, 1).cpu().numpy()

    def _sigmas(self) -> torch.Tensor:
        if self._sampling.sigmas is not None:
            return self._sampling.sigmas
        model_sampling = self._patcher.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(model_sampling, "simple", self._sampling.steps)

    def _pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) in [0, 1]: the VAE's, or the host's cheap approximation of them."""
        if self._sampling.vae is not None:
            pictures = self._sampling.vae.decode(latents)
            return pictures.reshape(-1, *pictures.shape[-3:])
        model = self._patcher.model
        return _approximate(model.process_latent_in(latents), model.latent_format)

    def _save(self, pixels: np.ndarray, step: int) -> None:
        path = self._folder / "preview" / f"step{step:08d}.png"
        picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
        try:
            with replaced_when_whole(path) as file:
                picture.save(file, format="PNG")
        except NotWrittenError as error:
            logger.warning("the preview of step %d is shown, but not saved (%s)", step, error)


def _approximate(latents: torch.Tensor, latent_format: Any) -> torch.Tensor:
    """Latents in the model's scale through the host's table latent -> RGB, one pixel per cell."""
    factors = latent_format.latent_rgb_factors
    if factors is None:
        raise ValueError("this model's latents cannot be shown without a VAE; connect vae")
    frame = latents[:, :, 0] if latents.ndim == 5 else latents
    table = torch.tensor(factors, dtype=frame.dtype, device=frame.device)
    bias = latent_format.latent_rgb_factors_bias
    rgb = frame.movedim(1, -1) @ table
    if bias is not None:
        rgb = rgb + torch.tensor(bias, dtype=rgb.dtype, device=rgb.device)
    return (rgb + 1) / 2


def previewed(
    steps: Iterable[TrainingStep], run: TrainingRun, previewer: Previewer
) -> Iterator[TrainingStep]:
    """Pass the steps through and draw a preview every n of them, and after the last."""
    for step in steps:
        if step.step % previewer.every_n_steps == 0 or step.step == run.plan.steps:
            previewer.draw(run)
        yield step
