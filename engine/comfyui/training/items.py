"""Latents and conditioning, as core's dataset nodes give them, as single items for the loop."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...timesteps.sampling import TimestepSampling
from ...training.dataset import TrainingItem
from ..differentiable.denoiser import ComfyDenoiser

logger = logging.getLogger("comfyui_braid.training")

Pair = tuple[Tensor, list]
"""(samples (1, C, [T], H, W), one CONDITIONING)."""


def pair_items(latents: Sequence[dict[str, Any]], positive: Sequence[list]) -> list[Pair]:
    """One pair per picture or clip; ValueError when the two lists do not fit.

    Understands Make Training Dataset (one latent and one conditioning each), Resolution Bucket
    (a batch of latents with a list of its entries), one latent batch with one conditioning list,
    and one conditioning for all.
    """
    singles = [sample for latent in latents for sample in _samples(latent)]
    if not singles:
        raise ValueError("latents is empty; connect at least one latent to train on")
    _refuse_what_is_no_number(singles, positive)
    shared = _one_for_all(positive)
    if shared is not None:
        return [(sample, shared) for sample in singles]
    if len(positive) == len(latents):
        spread = (
            _spread(conditioning, len(latent["samples"]))
            for conditioning, latent in zip(positive, latents, strict=True)
        )
        fitting = [entries for entries in spread if entries]
        if len(fitting) == len(latents):
            entries = [entry for entries in fitting for entry in entries]
            return list(zip(singles, entries, strict=True))
    entries = [[entry] for conditioning in positive for entry in conditioning]
    if len(entries) != len(singles):
        raise ValueError(
            f"there are {len(singles)} latents but {len(entries)} conditionings; give one "
            "conditioning per latent, or exactly one for all"
        )
    return list(zip(singles, entries, strict=True))


def prepared(
    denoiser: ComfyDenoiser, pairs: Sequence[Pair], sampling: TimestepSampling
) -> list[TrainingItem]:
    """The items as the loop takes them; ValueError for what the model or the noise levels do not
    fit."""
    ready = [denoiser.prepare(samples, positive) for samples, positive in pairs]
    denoiser.check(ready)
    for height, width in {latents.shape[-2:] for latents, _ in ready}:
        sampling.distribution(height, width)
    return [
        TrainingItem(
            latents=latents[0],
            conditioning=conditioning,
            batch_key=tuple(latents.shape[1:]),
        )
        for latents, conditioning in ready
    ]


def mixes_prompts(items: Sequence[TrainingItem]) -> bool:
    """Whether items of one size have prompts that the network takes only one after the other."""
    return len({item.batch_key for item in items}) < len(
        {(item.batch_key, item.conditioning.key) for item in items}
    )


def _samples(latent: dict[str, Any]) -> list[Tensor]:
    """Every picture or clip of a LATENT, (1, C, [T], H, W) each."""
    samples = latent["samples"]
    if samples.is_nested:
        raise ValueError(
            "latents that pack several streams (sound and video) cannot be trained on; "
            "connect the latents of one stream"
        )
    if "noise_mask" in latent:
        logger.warning("the latents have a noise mask: it is not used, all of each is trained on")
    return [sample[None] for sample in samples]


def _refuse_what_is_no_number(singles: Sequence[Tensor], positive: Sequence[list]) -> None:
    entries = [entry for conditioning in positive for entry, *_ in conditioning]
    for name, tensors in (("latents", singles), ("positive", entries)):
        for number, tensor in enumerate(tensors, start=1):
            if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{name}: item {number} holds NaN or infinite values; encode it again, "
                    "in fp32 or bf16 if it was fp16"
                )


def _one_for_all(positive: Sequence[list]) -> list | None:
    return positive[0] if len(positive) == 1 and len(positive[0]) == 1 else None


def _spread(conditioning: list, count: int) -> list[list] | None:
    """One CONDITIONING for each of `count` latents of a batch; None when they do not fit."""
    if len(conditioning) == count:
        return [[entry] for entry in conditioning]
    return [conditioning] * count if len(conditioning) == 1 else None
