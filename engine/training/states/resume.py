"""Whether a saved state belongs to a run, and the run put where it left off."""

import os
from pathlib import Path
from typing import Any

from ...checkpoints import SHADOWS_SUFFIX, step_of
from ...disk.reading import DamagedFileError, one_line, shown
from ...files import read_header
from ..loop import TrainingRun
from .form import count_of, misfits_refused, part_of
from .identity import Identity
from .saving import STEP_NAME
from .state import STATE_SUFFIX, read_state

SHOWN = 60
"""Characters of a long setting that are shown around what differs, to both sides."""


def resumed(run: TrainingRun, path: Path, identity: Identity) -> dict[str, Any]:
    """Put the run where the state file `path` left it; returns the rest of that state.

    ValueError when the state is damaged (DamagedFileError) or of another network, data or plan.
    """
    state = read_state(path)
    try:
        saved_identity, saved_run = part_of(state, "identity"), part_of(state, "run")
        step = count_of(saved_run, "step")
    except ValueError as error:
        raise DamagedFileError(
            path, f"the training state is damaged ({error}); resume from an earlier one"
        ) from error
    if different := identity.difference(saved_identity):
        name, theirs, ours = different
        was, now = _apart(_as_text(theirs), str(ours))
        raise ValueError(
            f"resume: {path.name} was saved with {name} {was}, this run has {now}; "
            "resume with the same setting, or clear resume to start afresh"
        )
    with_shadows = bool(identity.named.get("ema_shadows"))
    if step > run.plan.steps or (step == run.plan.steps and _is_finished(path, step, with_shadows)):
        raise ValueError(
            f"resume: {path.name} is already at step {step} of {run.plan.steps}; raise steps to "
            "train on"
        )
    with misfits_refused(path.name):
        run.load_state_dict(saved_run)
    run.resumed_from = path.name
    return {key: value for key, value in state.items() if key not in ("identity", "run")}


def _as_text(value: Any) -> str:
    return one_line(value if isinstance(value, str) else shown(value), 10_000)


def _apart(theirs: str, ours: str) -> tuple[str, str]:
    """Two texts, of long ones the part in which they differ."""
    if max(len(theirs), len(ours)) <= 2 * SHOWN:
        return theirs, ours
    same = len(os.path.commonprefix([theirs, ours]))
    start = max(same - SHOWN // 2, 0)
    part = slice(start, start + 2 * SHOWN)
    return f"…{theirs[part]}…", f"…{ours[part]}…"


def _is_finished(state_file: Path, step: int, with_shadows: bool) -> bool:
    """Whether the finished files of `step` are there; a run stopped before them is not done."""
    stem = STEP_NAME.sub(".", state_file.name).removesuffix(STATE_SUFFIX)
    final = state_file.with_name(f"{stem}.safetensors")
    wanted = [final, state_file.with_name(f"{stem}{SHADOWS_SUFFIX}")][: 1 + with_shadows]
    return all(
        path.is_file() and step_of(path, read_header(path).metadata) == step for path in wanted
    )
