"""In which order the checkpoints of a run were trained, and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints import Checkpoint, epoch_of
from ..files import read_header
from ..refusals import refuse_other

SORTS = ("step", "mtime", "given")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedOrder:
    """Checkpoint files, oldest first, with the training time of each."""

    files: tuple[Path, ...]
    times: tuple[float, ...]
    """Strictly increasing, counted from the start of training."""
    unit: str
    """What `times` counts: steps, epochs, or files (equal spacing assumed)."""
    order_from: str
    """What put the files in order."""
    duplicates: tuple[Path, ...] = ()
    """Files left out because another holds the same tensors of the same step."""
    windowed: bool = False
    """Whether earlier files of the run were left out on purpose."""


def trained_order(checkpoints: Sequence[Checkpoint], sort: str = "step") -> TrainedOrder:
    """Order by training step or epoch, by modification time, or as given.

    `step` needs every file to say its step, or every file its epoch, in its metadata or name, so
    that copied, touched or shuffled files change nothing. Two files of one step are one checkpoint
    saved twice when their tensors are equal, and refused otherwise.
    """
    if not checkpoints:
        raise ValueError("no checkpoints to average; load a folder that holds some")
    refuse_other("sort", sort, SORTS)
    if sort == "step":
        return _by_training_time(checkpoints)
    if sort == "mtime":
        by_mtime = sorted(checkpoints, key=lambda item: item.path.stat().st_mtime_ns)
        return _in_this_order(by_mtime, "modification time")
    return _in_this_order(checkpoints, "as given")


def selected(order: TrainedOrder, first: int = 1, last: int = 0) -> TrainedOrder:
    """Checkpoints `first` to `last`, counted from 1; 0 as `last` means up to the newest."""
    count = len(order.files)
    stop = last or count
    if not 1 <= first <= stop <= count:
        raise ValueError(
            f"first {first}, last {last}: must be 1 <= first <= last <= {count}, the number of "
            "checkpoints (last 0 = the newest)"
        )
    return TrainedOrder(
        files=order.files[first - 1 : stop],
        times=order.times[first - 1 : stop],
        unit=order.unit,
        order_from=order.order_from,
        duplicates=order.duplicates,
        windowed=first > 1,
    )


def _by_training_time(checkpoints: Sequence[Checkpoint]) -> TrainedOrder:
    known = {item.path: item.step for item in checkpoints if item.step is not None}
    unit, order_from = "steps", "step (metadata or name)"
    unstepped = [item.path for item in checkpoints if item.step is None]
    if unstepped:
        found = {item.path: _epoch(item.path) for item in checkpoints}
        known = {path: epoch for path, epoch in found.items() if epoch is not None}
        unit, order_from = "epochs", "epoch (name or metadata)"
    if len(known) < len(checkpoints):
        raise ValueError(
            f"{unstepped[0].name}: neither metadata (ss_steps, ss_epoch) nor name (-step00000100, "
            f"-000012, _100_steps_) tells when it was saved ({len(unstepped)} of "
            f"{len(checkpoints)} files); rename it, leave it out, or sort by mtime or given"
        )
    ordered = sorted(known, key=lambda path: (known[path], path.name))
    kept: list[Path] = []
    duplicates: list[Path] = []
    for path in ordered:
        if kept and known[path] == known[kept[-1]]:
            _check_equal_tensors(kept[-1], path, f"{unit.removesuffix('s')} {known[path]}")
            duplicates.append(path)
        else:
            kept.append(path)
    return TrainedOrder(
        files=tuple(kept),
        times=tuple(float(known[path]) for path in kept),
        unit=unit,
        order_from=order_from,
        duplicates=tuple(duplicates),
    )


def _epoch(path: Path) -> int | None:
    return epoch_of(path, read_header(path).metadata)


def _in_this_order(checkpoints: Sequence[Checkpoint], order_from: str) -> TrainedOrder:
    files = tuple(item.path for item in checkpoints)
    steps = [item.step for item in checkpoints if item.step is not None]
    increasing = all(a < b for a, b in zip(steps, steps[1:], strict=False))
    if len(steps) == len(files) and increasing:
        return TrainedOrder(
            files=files, times=tuple(map(float, steps)), unit="steps", order_from=order_from
        )
    equally_spaced = tuple(float(i + 1) for i in range(len(files)))
    return TrainedOrder(files=files, times=equally_spaced, unit="files", order_from=order_from)


def _check_equal_tensors(one: Path, other: Path, when: str) -> None:
    if _data_bytes(one) != _data_bytes(other):
        raise ValueError(
            f"{one.name} and {other.name} both say {when} but differ; leave one out, "
            "or sort by mtime or given"
        )


def _data_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(read_header(path).data_start)
        return file.read()
