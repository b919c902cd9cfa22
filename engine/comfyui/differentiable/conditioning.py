"""CONDITIONING made ready once, so that a training step only has to stack it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn

UNTRAINABLE = {
    "control": "a ControlNet",
    "gligen": "GLIGEN boxes",
    "hooks": "hooks (conditioning-bound LoRAs or schedules)",
    "area": "an area",
    "mask": "a mask",
    "start_percent": "a timestep range",
    "end_percent": "a timestep range",
}
"""Conditioning options that change how sampling is done; training has no place for them."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Conditioning:
    """What a model is told about one item beside its noised latents."""

    inputs: dict[str, comfy.conds.CONDRegular]
    """The model's own condition objects by argument name, for a batch of one, on the CPU."""

    key: tuple
    """Items with equal keys can be stacked into one batch."""

    uuid: UUID
    """Names this conditioning to wrappers that keep something for each."""

    @property
    def widths(self) -> tuple:
        """What must fit the network whatever the length of the prompt: last sizes by name."""
        return tuple(
            (name, cond.cond.shape[-1])
            for name, cond in sorted(self.inputs.items())
            if isinstance(cond.cond, Tensor) and cond.cond.ndim
        )

    def describe(self) -> str:
        """The inputs and their widths, for an error message."""
        return ", ".join(f"{name} {width} wide" for name, width in self.widths) or "no tensors"


@torch.inference_mode()
def encode(
    model: Any, latents: Tensor, conditioning: list, device: torch.device, guidance: float | None
) -> dict[str, comfy.conds.CONDRegular]:
    """`conditioning` (one CONDITIONING) through the model's own `extra_conds`, for one item.

    `latents` (1, C, ...) are what the model is trained on, already in the model's own scale.
    `guidance` replaces the distilled guidance that the conditioning asks for, in networks that
    embed one.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"a training item needs exactly one prompt, its conditioning has {len(conditioning)} "
            "parts; do not combine conditionings for training"
        )
    prompt = conditioning[0][0]
    if isinstance(prompt, Tensor) and len(prompt) != 1:
        raise ValueError(
            f"a training item needs exactly one prompt, its conditioning is a batch of "
            f"{len(prompt)}; give each item a conditioning of its own"
        )
    for key, what in UNTRAINABLE.items():
        if key in conditioning[0][1]:
            raise ValueError(f"conditioning with {what} ({key!r}) cannot be trained on; remove it")
    conds = comfy.sampler_helpers.convert_cond(conditioning)
    if guidance is not None and _embeds_guidance(model.diffusion_model):
        conds[0]["guidance"] = guidance
    conds = comfy.samplers.encode_model_conds(
        model.extra_conds,
        conds,
        latents,
        device,
        "positive",
        latent_image=latents,
        denoise_mask=None,
        seed=0,
        latent_shapes=[latents.shape],
    )
    return {
        name: cond.process_cond(batch_size=1, area=None)
        for name, cond in conds[0]["model_conds"].items()
    }


def settled(inputs: dict[str, comfy.conds.CONDRegular]) -> Conditioning:
    """`inputs` with tensors that autograd may save; to be called outside inference mode."""
    inputs = {name: cond._copy_with(_cloned(cond.cond)) for name, cond in inputs.items()}
    key = tuple((name, type(inputs[name]), _shape(inputs[name])) for name in sorted(inputs))
    return Conditioning(inputs=inputs, key=key, uuid=uuid4())


def stacked(items: Sequence[Conditioning], device: torch.device) -> dict[str, Any]:
    """The model's arguments for a batch of `items`, which have equal keys."""
    together = comfy.samplers.cond_cat([dict(item.inputs) for item in items])
    return {name: _moved(value, device) for name, value in together.items()}


def groups(items: Sequence[Conditioning]) -> list[list[int]]:
    """Indices of `items` by equal key, in order of first appearance."""
    by_key: dict[tuple, list[int]] = {}
    for index, item in enumerate(items):
        by_key.setdefault(item.key, []).append(index)
    return list(by_key.values())


def _embeds_guidance(network: nn.Module) -> bool:
    """Whether the distilled guidance is a setting of this network.

    Chroma takes a guidance too, which is always 0: it was distilled away.
    """
    embedding = getattr(network, "guidance_in", None)
    return isinstance(embedding, nn.Module) and any(True for _ in embedding.parameters())


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, (list, tuple)):
        return type(value)(_cloned(part) for part in value)
    return value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(part, device) for part in value)
    return value


def _shape(cond: comfy.conds.CONDRegular) -> Any:
    """What must be equal for two conditions to be stacked without changing their meaning."""
    if isinstance(cond, comfy.conds.CONDConstant):
        return _fingerprint(cond.cond)
    if isinstance(cond.cond, (list, tuple)):
        return tuple(tuple(part.shape) for part in cond.cond)
    return tuple(cond.cond.shape)


def _fingerprint(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, tuple(value.flatten().tolist())
    if isinstance(value, (list, tuple)):
        return tuple(_fingerprint(part) for part in value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)
