"""EMA shadows: a few averages kept while a run trains, from which any other is rebuilt afterwards.

    shadows = Shadows(adapter_tensors)          before the first step
    shadows.update(step)                        after every optimizer step; cheap
    shadows.write(folder / "run-shadows.safetensors", constants, metadata)

File: float32 tensors `<sigma_rel>/<adapter key>` for each shadow, the tensors that no average
touches (alphas) as `constant/<adapter key>`, the metadata of the run, and under `braid.shadows` the
JSON of `ShadowsInfo`. Equation numbers: arXiv 2312.02696.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import AdapterStateDict, Checkpoints
from ..files import DTYPES, read_header, sshs_hashes, write_safetensors
from ..refusals import refuse_below
from .layout import Source
from .merge import Progress
from .profile import (
    Floats,
    centre_of_mass,
    gamma_from_sigma_rel,
    inner_product,
    power_beta,
    power_profile,
)

SIGMA_RELS = (0.05, 0.08, 0.13, 0.2, 0.25)
"""Five widths from which every profile of 0.05 to 0.25 is rebuilt within 0.8 %.

With 0.12 and 0.18 in the middle instead, the widths around 0.23 are off by up to 1.4 %.
"""
UPDATE_EVERY_STEPS = 10
METADATA_KEY = "braid.shadows"
FORMAT = 1
CONSTANT = "constant"


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
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`; ValueError when it is of another adapter or widths."""
        ours = self.state_dict()
        for key in sorted(ours.keys() ^ state.keys()):
            raise ValueError(
                f"EMA shadows: {key} is {'missing in' if key in ours else 'only in'} the saved "
                "state; resume with the network and the shadows the run was started with"
            )
        for key, tensor in ours.items():
            if key != "step":
                tensor.copy_(state[key])
        self.step = int(state["step"])

    def write(
        self, path: Path, constants: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Save for reconstruction, whole or not at all; call `catch_up` first.

        `constants` are the tensors of an adapter file that training does not move (alphas),
        `metadata` that of the run's adapter files.
        """
        info = ShadowsInfo(
            step=self.step,
            sigma_rels=self.sigma_rels,
            update_every_steps=self.update_every_steps,
        )
        tensors = {key: value for key, value in self.state_dict().items() if key != "step"}
        tensors |= {f"{CONSTANT}/{key}": value for key, value in constants.items()}
        write_safetensors(path, tensors, {**metadata, METADATA_KEY: json.dumps(asdict(info))})


def read_shadows_info(path: Path) -> ShadowsInfo:
    """What a shadow file holds; ValueError when it is not one."""
    text = read_header(path).metadata.get(METADATA_KEY)
    if text is None:
        raise ValueError(
            f"{path}: not a file of EMA shadows; train with ema_shadows on, which writes one"
        )
    saved = json.loads(text)
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{path}: EMA shadows of format {saved.get('format')}, this version reads {FORMAT}"
        )
    return ShadowsInfo(
        step=saved["step"],
        sigma_rels=tuple(saved["sigma_rels"]),
        update_every_steps=saved["update_every_steps"],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """How a profile is put together from shadows that end at the same step."""

    sigma_rel: float
    """Requested spread."""
    stored: tuple[float, ...]
    """Spread of each shadow."""
    coefficients: tuple[float, ...]
    """What each shadow counts; they sum to 1 and may be negative."""
    profile_error: float
    """Distance between the two profiles relative to the requested one (L2 over training time)."""
    end: int
    """Optimizer step at which the profiles end."""

    def profile(self, time: Floats) -> Floats:
        """The profile that comes out."""
        return sum(
            (x * power_profile(time, self.end, gamma_from_sigma_rel(stored)))
            for x, stored in zip(self.coefficients, self.stored, strict=True)
        ) + np.zeros_like(time)

    def report(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "requested_sigma_rel": self.sigma_rel,
            "requested_centre_of_mass": centre_of_mass(gamma_from_sigma_rel(self.sigma_rel)),
            "stored_sigma_rels": list(self.stored),
            "coefficients": list(self.coefficients),
            "profile_error": self.profile_error,
            "step": self.end,
        }


def solve_reconstruction(stored: Sequence[float], sigma_rel: float, end: int) -> Reconstruction:
    """Least-squares fit of a profile by stored ones (Algorithm 3) under sum(x) = 1.

    The constraint keeps the mass of the average: without it whatever is missing pulls the
    parameters to zero, which costs more than the fit gains.
    """
    gammas = np.array([gamma_from_sigma_rel(value) for value in stored])
    gamma = np.float64(gamma_from_sigma_rel(sigma_rel))
    gram = inner_product(gammas[:, None], 1.0, gammas[None, :], 1.0)
    target = inner_product(gammas, 1.0, gamma, 1.0)
    count = len(stored)
    system = np.block([[gram, np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]])
    x = np.linalg.solve(system, np.append(target, 1.0))[:count]
    norm = inner_product(gamma, 1.0, gamma, 1.0)
    squared = norm - 2 * x @ target + x @ gram @ x
    return Reconstruction(
        sigma_rel=sigma_rel,
        stored=tuple(stored),
        coefficients=tuple(x.tolist()),
        profile_error=float(np.sqrt(max(squared, 0.0) / norm)),
        end=end,
    )


def plan_reconstruction(checkpoints: Checkpoints, sigma_rel: float) -> Reconstruction:
    """How to rebuild `sigma_rel` from the shadows of a run; ValueError when it kept none."""
    if checkpoints.shadows is None:
        raise ValueError(
            "these checkpoints have no EMA shadows beside them (<run>-shadows.safetensors): train "
            "with ema_shadows on, or average the checkpoints with Post-Hoc EMA"
        )
    info = read_shadows_info(checkpoints.shadows)
    return solve_reconstruction(info.sigma_rels, sigma_rel, info.step)


def reconstructed(
    checkpoints: Checkpoints, reconstruction: Reconstruction, output: Path | None = None
) -> Generator[Progress, None, AdapterStateDict]:
    """The adapter with this profile in the dtypes of the run's files; saved if `output` is given.

    Without files, or when theirs is another adapter, it is float32.
    """
    path = checkpoints.shadows
    assert path is not None, "plan_reconstruction refuses a run without shadows"
    source = Source(path=path, header=read_header(path))
    constants = [key for key in source.header.tensors if key.startswith(f"{CONSTANT}/")]
    prefix = f"{reconstruction.stored[0]}/"
    keys = [key.removeprefix(prefix) for key in source.header.tensors if key.startswith(prefix)]
    dtypes = _saved_dtypes(checkpoints)
    tensors = {key.removeprefix(f"{CONSTANT}/"): source.read(key) for key in constants}
    for done, key in enumerate(keys, start=1):
        tensors[key] = _combined(source, key, reconstruction).to(dtypes.get(key, torch.float32))
        yield Progress(done, len(keys))
    metadata = {k: v for k, v in source.header.metadata.items() if k != METADATA_KEY}
    metadata["modelspec.merged_from"] = path.stem
    if output:
        write_safetensors(output, tensors, metadata | sshs_hashes(tensors, metadata))
    return AdapterStateDict(tensors, metadata)


def _combined(source: Source, key: str, reconstruction: Reconstruction) -> Tensor:
    parts = zip(reconstruction.coefficients, reconstruction.stored, strict=True)
    return torch.stack([x * source.read_finite(f"{stored}/{key}") for x, stored in parts]).sum(0)


def _saved_dtypes(checkpoints: Checkpoints) -> dict[str, torch.dtype]:
    """Dtype of each tensor in the newest adapter file of the run."""
    if not checkpoints.files:
        return {}
    tensors = read_header(checkpoints.files[-1].path).tensors
    return {key: DTYPES[entry.dtype] for key, entry in tensors.items() if entry.dtype in DTYPES}
