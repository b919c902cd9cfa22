"""In which order the checkpoints of a run were trained, and when."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from ..checkpoints import Checkpoint, epoch_of
from ..disk.folders import Search
from ..files import read_header
from ..refusals import refuse_other
from ..texts import Text
from .profile import Floats

SORTS = ("step", "mtime", "given")
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedOrder:
    """Checkpoint files, oldest first, with the training time of each."""

    files: Sequence[Path]
    times: Sequence[float] | Floats
    """Strictly increasing, counted from the start of training."""
    unit: str
    """What `times` counts: steps, epochs, or files (equal spacing assumed)."""
    order_from: str
    """What put the files in order."""
    duplicates: tuple[Path, ...] = ()
    """Files left out because another holds the same tensors of the same step."""
    windowed: bool = False
    """Whether earlier files of the run were left out on purpose."""

    def name(self, index: int) -> str:
        """What a file is called, or what one that is still to come is saved at."""
        files = self.files
        return files.name(index) if isinstance(files, PlannedFiles) else files[index].name


class PlannedFiles(Sequence[Path]):
    """Names of files that do not exist yet, made when asked for: a run may plan a million."""

    def __init__(self, times: Floats, unit: str) -> None:
        self._times = times
        self._unit = unit

    def __len__(self) -> int:
        return len(self._times)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> "PlannedFiles": ...

    def __getitem__(self, index: int | slice) -> "Path | PlannedFiles":
        if isinstance(index, slice):
            return PlannedFiles(self._times[index], self._unit)
        return Path(self.name(index))

    def name(self, index: int) -> Text:
        """What is known of one: its step, or its place among the files."""
        number = f"{self._times[index]:.10g}"
        if self._unit == "steps":
            return Text("step {number}", number=number)
        return Text("file {number}", number=number)


def planned_order(times: Sequence[float], unit: str) -> TrainedOrder:
    """The order of a run whose files do not exist yet; `unit` is steps or files."""
    moments = np.asarray(times, dtype=np.float64)
    return TrainedOrder(
        files=PlannedFiles(moments, unit),
        times=moments,
        unit=unit,
        order_from="nothing yet: the files are still to come",  # a chart shows its note instead
    )


def trained_order(
    checkpoints: Sequence[Checkpoint], sort: str = "step", search: Search | None = None
) -> TrainedOrder:
    """Order by training step or epoch, by modification time, or as given; `search` bounds what is
    read of two files of one step.

    `step` needs every file to say its step, or every file its epoch, in its metadata or name, so
    that copied, touched or shuffled files change nothing. Two files of one step are one checkpoint
    saved twice when their tensors are equal, and refused otherwise.
    """
    if not checkpoints:
        raise ValueError("no checkpoints to average; load a folder that holds some")
    refuse_other("sort", sort, SORTS)
    if sort == "step":
        return _by_training_time(checkpoints, search)
    if sort == "mtime":
        by_mtime = sorted(checkpoints, key=lambda item: item.path.stat().st_mtime_ns)
        return _in_this_order(by_mtime, Text("modification time"))
    return _in_this_order(checkpoints, Text("as given"))


def selected(order: TrainedOrder, first: int = 1, last: int = 0) -> TrainedOrder:
    """Checkpoints `first` to `last`, counted from 1; 0 as `last` means up to the newest."""
    count = len(order.files)
    stop = last or count
    if not 1 <= first <= stop <= count:
        sentence = Text(
            "first {first}, last {last}: must be 1 <= first <= last <= {count}, the number of "
            "checkpoints (last 0 = the newest)",
            first=first,
            last=last,
            count=count,
        )
        raise ValueError(sentence)
    return TrainedOrder(
        files=order.files[first - 1 : stop],
        times=order.times[first - 1 : stop],
        unit=order.unit,
        order_from=order.order_from,
        duplicates=order.duplicates,
        windowed=first > 1,
    )


def _by_training_time(checkpoints: Sequence[Checkpoint], search: Search | None) -> TrainedOrder:
    known = {item.path: item.step for item in checkpoints if item.step is not None}
    unit, order_from = "steps", Text("step (metadata or name)")
    unstepped = [item.path for item in checkpoints if item.step is None]
    if unstepped:
        found = {item.path: _epoch(item.path) for item in checkpoints}
        known = {path: epoch for path, epoch in found.items() if epoch is not None}
        unit, order_from = "epochs", Text("epoch (name or metadata)")
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
            _check_equal_tensors(kept[-1], path, f"{unit.removesuffix('s')} {known[path]}", search)
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


def _check_equal_tensors(one: Path, other: Path, when: str, search: Search | None) -> None:
    chunks = zip(_data(one, search), _data(other, search), strict=True)
    if _data_size(one) != _data_size(other) or any(a != b for a, b in chunks):
        raise ValueError(
            f"{one.name} and {other.name} both say {when} but differ; leave one out, "
            "or sort by mtime or given"
        )


def _data_size(path: Path) -> int:
    return path.stat().st_size - read_header(path).data_start


def _data(path: Path, search: Search | None) -> Iterator[bytes]:
    """What follows the header, chunk by chunk."""
    with path.open("rb") as file:
        file.seek(read_header(path).data_start)
        for chunk in iter(functools.partial(file.read, CHUNK_BYTES), b""):
            if search:
                search.spend(path)
            yield chunk
