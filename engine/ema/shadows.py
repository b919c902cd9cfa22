"""EMA shadows: a few averages kept while a run trains; `reconstruction` rebuilds any other of them.

    shadows = Shadows(adapter_tensors)          before the first step
    shadows.update(step)                        after every optimizer step; cheap
    shadows.write(folder / "run-shadows.safetensors", constants, metadata)

File: float32 tensors `<sigma_rel>/<adapter key>` for each shadow, the tensors that no average
touches (alphas) as `constant/<adapter key>`, the metadata of the run, and under `braid.shadows` the
JSON of `ShadowsInfo`. Equation numbers: arXiv 2312.02696.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_safetensors
from ..refusals import refuse_below, shortened
from .profile import (
    gamma_from_sigma_rel,
    power_beta,
)

SIGMA_RELS = (0.05, 0.08, 0.13, 0.2, 0.25)
"""Five widths from which every profile of 0.05 to 0.25 is rebuilt within 0.8 %.

With 0.12 and 0.18 in the middle instead, the widths around 0.23 are off by up to 1.4 %.
"""
UPDATE_EVERY_STEPS = 10
METADATA_KEY = "braid.shadows"
FORMAT = 1
CONSTANT = "constant"
LARGEST_STEP = 2**53


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowsInfo:
    """What a shadow file says about itself."""

    step: int
    """Optimizer step of the last update: the end of every profile."""
    sigma_rels: tuple[float, ...]
    """Relative spread of each shadow."""
    update_every_steps: int
    """Optimizer steps between updates."""
    format: int = FORMAT


class Shadows:
    """Power-function averages of live tensors, kept beside them in float32 (Eq. 127).

    Between two updates the tensors count as held at their newest value, so an update after q steps
    with beta = (1 - q / step)^(gamma + 1) covers all q of them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        sigma_rels: Sequence[float] = SIGMA_RELS,
        update_every_steps: int = UPDATE_EVERY_STEPS,
    ) -> None:
        """`tensors` are watched, not copied: the optimizer must change them in place."""
        refuse_below("update_every_steps", update_every_steps, 1)
        self.sigma_rels = tuple(sigma_rels)
        self.update_every_steps = update_every_steps
        self.step = 0
        self._keys = list(tensors)
        self._live = list(tensors.values())
        self._gammas = [gamma_from_sigma_rel(sigma_rel) for sigma_rel in self.sigma_rels]
        self._shadows = [
            [torch.zeros_like(t, dtype=torch.float32) for t in self._live] for _ in self.sigma_rels
        ]

    def is_due(self, step: int) -> bool:
        """Whether `update` would average at `step`."""
        return step - self.step >= self.update_every_steps

    def update(self, step: int) -> None:
        """Tell that optimizer step `step` (from 1) is done; averages when enough have passed."""
        if self.is_due(step):
            self.catch_up(step)

    @torch.no_grad()
    def catch_up(self, step: int) -> None:
        """Average up to `step` now, however few steps have passed: before a save."""
        if step == self.step:
            return
        if step < self.step:
            raise ValueError(f"step {step}: the shadows have already seen step {self.step}")
        live = [tensor.detach().to(torch.float32) for tensor in self._live]
        for gamma, shadows in zip(self._gammas, self._shadows, strict=True):
            beta = power_beta(gamma, step, step - self.step)
            torch._foreach_lerp_(shadows, live, 1 - beta)
        self.step = step

    def state_dict(self) -> dict[str, Tensor]:
        """`<sigma_rel>/<key>` of every shadow and `step`, for a training state."""
        state = {
            f"{sigma_rel}/{key}": shadow
            for sigma_rel, shadows in zip(self.sigma_rels, self._shadows, strict=True)
            for key, shadow in zip(self._keys, shadows, strict=True)
        }
        return state | {"step": torch.tensor(self.step)}

    @torch.no_grad()
    def load_state_dict(self, state: Any) -> None:
        """Continue from `state_dict()`; ValueError when it is anything else, or of another adapter
        or widths."""
        ours = self.state_dict()
        if not isinstance(state, Mapping):
            raise ValueError("EMA shadows: the saved state holds none; resume without ema_shadows")
        for key in sorted(ours.keys() ^ state.keys(), key=str):
            raise ValueError(
                f"EMA shadows: {shortened(str(key))} is "
                f"{'missing in' if key in ours else 'only in'} the saved state; resume with the "
                "network and the shadows the run was started with"
            )
        for key, tensor in ours.items():
            saved = state[key]
            if not isinstance(saved, Tensor) or saved.shape != tensor.shape:
                raise ValueError(f"EMA shadows: {key} of the saved state is not like this run's")
        step = state["step"]
        if step.dtype != torch.int64 or not 0 <= step <= LARGEST_STEP:
            raise ValueError(f"EMA shadows: the saved state is of step {step.item()}")
        for key, tensor in ours.items():
            tensor.copy_(state[key])
        self.step = int(step)

    def write(
        self,
        path: Path,
        constants: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        filed: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    ) -> None:
        """Save for reconstruction, whole or not at all; call `catch_up` first.

        `constants` are the tensors of an adapter file that training does not move (alphas),
        `metadata` that of the run's adapter files. `filed` puts tensors under the keys of the live
        ones into the form of those files; it must be linear, as averages of averages follow.
        """
        info = ShadowsInfo(
            step=self.step,
            sigma_rels=self.sigma_rels,
            update_every_steps=self.update_every_steps,
        )
        tensors = {
            f"{sigma_rel}/{key}": tensor
            for sigma_rel, shadows in zip(self.sigma_rels, self._shadows, strict=True)
            for key, tensor in filed(dict(zip(self._keys, shadows, strict=True))).items()
        }
        tensors |= {f"{CONSTANT}/{key}": value for key, value in constants.items()}
        write_safetensors(path, tensors, {**metadata, METADATA_KEY: json.dumps(asdict(info))})
