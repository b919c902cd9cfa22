"""Any average of a run, rebuilt afterwards from the file of its EMA shadows.

Equation numbers: arXiv 2312.02696.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import AdapterStateDict, Checkpoints
from ..disk.hashes import sshs_hashes
from ..disk.reading import AGAIN, DamagedFileError, parse_json, shown
from ..files import DTYPES, read_header, write_safetensors
from .layout import Source
from .merge import Progress
from .profile import (
    Floats,
    centre_of_mass,
    check_sigma_rel,
    gamma_from_sigma_rel,
    inner_product,
    power_profile,
)
from .shadows import CONSTANT, FORMAT, LARGEST_STEP, METADATA_KEY, ShadowsInfo

MOST_WIDTHS = 100
"""Shadows in one file; five are written, and every one costs memory while it is trained."""


def read_shadows_info(path: Path) -> ShadowsInfo:
    """What a shadow file holds; DamagedFileError when it is not one."""
    text = read_header(path).metadata.get(METADATA_KEY)
    if text is None:
        raise DamagedFileError(
            path, "not a file of EMA shadows; train with ema_shadows on, which writes one"
        )
    try:
        saved = parse_json(text, deepest=2)
        return _checked_info(saved)
    except ValueError as error:
        raise DamagedFileError(path, f"damaged file of EMA shadows ({error}); {AGAIN}") from error


def _checked_info(saved: Any) -> ShadowsInfo:
    match saved:
        case {"format": int(version)} if version != FORMAT:
            raise ValueError(f"they are of format {version}, this version reads {FORMAT}")
        case {
            "format": int(),
            "step": int(step),
            "sigma_rels": [_, *_] as widths,
            "update_every_steps": int(every),
        } if 1 <= step <= LARGEST_STEP and every >= 1 and len(widths) <= MOST_WIDTHS:
            pass
        case _:
            raise ValueError(f"it says of itself {shown(saved)}")
    if not all(isinstance(width, float) for width in widths) or len({*widths}) < len(widths):
        raise ValueError(f"its sigma_rels are {shown(widths)}")
    for width in widths:
        check_sigma_rel(width)
    return ShadowsInfo(step=step, sigma_rels=tuple(widths), update_every_steps=every)


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
    squared = float(norm - 2 * x @ target + x @ gram @ x)
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
    keys = _averaged_keys(source, reconstruction)
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


def _averaged_keys(source: Source, reconstruction: Reconstruction) -> list[str]:
    """The adapter keys of the shadows, which every width must hold alike."""
    tensors = source.header.tensors
    prefix = f"{reconstruction.stored[0]}/"
    keys = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    for key in keys:
        shape = tensors[prefix + key].shape
        for stored in reconstruction.stored:
            entry = tensors.get(f"{stored}/{key}")
            if entry is None or entry.shape != shape or entry.dtype != "F32":
                raise DamagedFileError(
                    source.path,
                    f"damaged file of EMA shadows (those of {key} are not float32 of one shape in "
                    f"every width); {AGAIN}",
                )
    if not keys:
        raise DamagedFileError(source.path, f"damaged file of EMA shadows (it holds none); {AGAIN}")
    return keys


def _combined(source: Source, key: str, reconstruction: Reconstruction) -> Tensor:
    parts = zip(reconstruction.coefficients, reconstruction.stored, strict=True)
    return torch.stack([x * source.read_finite(f"{stored}/{key}") for x, stored in parts]).sum(0)


def _saved_dtypes(checkpoints: Checkpoints) -> dict[str, torch.dtype]:
    """Dtype of each tensor in the newest adapter file of the run."""
    if not checkpoints.files:
        return {}
    tensors = read_header(checkpoints.files[-1].path).tensors
    dtypes = {key: DTYPES[entry.dtype] for key, entry in tensors.items()}
    return {key: dtype for key, dtype in dtypes.items() if dtype.is_floating_point}
