"""The form of a saved state: whether each part of it can stand where the run's own stands.

A checksum says that a file is as it was written, and not that it was Braid who wrote it. Every
function raises a ValueError that names the part.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ...disk.reading import shown
from ...refusals import said

LARGEST_COUNT = 2**53
_MISFITS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
"""What somebody else's optimizer may raise about a state that is not its own."""


@contextmanager
def misfits_refused(state_file: str) -> Iterator[None]:
    """Inside, what is wrong with a state is a ValueError about that file; "" lets it pass."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _MISFITS as error:
        if not state_file:
            raise
        raise ValueError(
            f"resume: {state_file} does not fit this run ({said(error)}); resume with the settings "
            "it was saved with, or clear resume to start afresh"
        ) from error


def part_of(state: Any, name: str) -> Mapping[Any, Any]:
    """The mapping that a state holds under `name`."""
    part = state.get(name) if isinstance(state, Mapping) else None
    if not isinstance(part, Mapping):
        raise ValueError(f"it holds no {name}")
    return part


def count_of(state: Mapping[Any, Any], name: str) -> int:
    """The whole number, 0 or more, that a state holds under `name`."""
    count = state.get(name)
    if type(count) is not int or not 0 <= count <= LARGEST_COUNT:
        raise ValueError(f"its {name} is {shown(count)}")
    return count


def check_like(ours: Any, theirs: Any, name: str) -> None:
    """Mappings need the same keys, sequences the same length, tensors the same shape.

    Numbers, a tensor of one among them, stand for each other, and one number or nothing for None.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in ours.keys() ^ theirs.keys():
            only = "only in this run" if key in ours else "only in the file"
            raise ValueError(f"{name}: {shown(key)} is {only}")
        for key, value in ours.items():
            check_like(value, theirs[key], f"{name}/{key}")
    elif _is_sequence(ours) and _is_sequence(theirs) and len(ours) == len(theirs):
        for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            check_like(own, other, f"{name}/{index}")
    elif not _is_alike(ours, theirs):
        raise ValueError(f"{name} is {_kind(theirs)}, this run has {_kind(ours)}")


def optimizer_like(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, its groups with every setting that those of `ours` have.

    What an older version of the optimizer did not know is taken from `ours`.
    """
    own, groups, states = ours["param_groups"], theirs.get("param_groups"), part_of(theirs, "state")
    if not _is_sequence(groups) or len(groups) != len(own):
        raise ValueError(f"optimizer: this run has {len(own)} groups of parameters, it has others")
    completed = []
    for index, (settings, saved) in enumerate(zip(own, groups, strict=True)):
        if not isinstance(saved, Mapping):
            raise ValueError(f"optimizer: its group {index} is {_kind(saved)}")
        group = {**settings, **saved}
        check_like(settings, {key: group[key] for key in settings}, f"optimizer/{index}")
        if group["params"] != settings["params"]:
            raise ValueError(f"optimizer: its group {index} has other parameters than this run's")
        completed.append(group)
    count = sum(len(group["params"]) for group in own)
    for key, entries in states.items():
        if isinstance(key, int) and not (0 <= key < count and isinstance(entries, Mapping)):
            raise ValueError(f"optimizer: its state of parameter {key} of {count} is none")
    return {"param_groups": completed, "state": states}


def schedule_like(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a schedule, with what `ours` knows: the scheduler takes any key for a field.

    What an older torch did not save is taken from `ours`.
    """
    count_of(theirs, "last_epoch")
    completed = {key: theirs.get(key, value) for key, value in ours.items()}
    check_like(ours, completed, "schedule")
    return completed


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _is_alike(ours: Any, theirs: Any) -> bool:
    if _is_number(ours) or ours is None:
        return _is_number(theirs) or (ours is None and theirs is None)
    if isinstance(ours, Tensor):
        return isinstance(theirs, Tensor) and theirs.shape == ours.shape
    return type(ours) is type(theirs)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping) or _is_sequence(value):
        return f"a {type(value).__name__} of {len(value)}"
    return shown(value)
