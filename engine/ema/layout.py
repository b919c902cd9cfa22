"""What the files of one merge must agree on, and how their bytes line up.

Tensors that follow each other in every file are merged as one flat run of bytes, a `Span`, however
many there are: an adapter of a thousand small tensors streams like one large one.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..disk.reading import AGAIN, DamagedFileError
from ..files import DTYPES, SafetensorsHeader, TensorEntry, read_header, saved_layout

_ADAPTER_KEY = re.compile(
    r"\.(lora_(down|up|mid|A|B)\b|lora\.(down|up)\b|hada_w|lokr_w|oft_|boft_|dora_scale$|diff(_b)?$)"
)
ALPHA = ".alpha"
ALPHA_RTOL, ALPHA_ATOL = 1e-5, 1e-8  # torch.allclose, as musubi compares them


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file to merge."""

    path: Path
    header: SafetensorsHeader

    def read(self, key: str) -> Tensor:
        """One tensor, in its own dtype and shape."""
        return self.read_each([key])[key]

    def read_each(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors, for which the file is opened once."""
        with self.path.open("rb") as file:
            return {
                key: self._read(file, key).reshape(self.header.tensors[key].shape) for key in keys
            }

    def read_finite(self, key: str) -> Tensor:
        """One tensor as float32; ValueError when it holds NaN or infinity."""
        values = self.read(key).float()
        bad = values[~values.isfinite()]
        if len(bad):
            raise self.not_finite(key, float(bad[0]))
        return values

    def not_finite(self, key: str, value: float) -> DamagedFileError:
        """The refusal of a tensor that holds `value`."""
        return DamagedFileError(
            self.path, f"{key} holds {value}; the run diverged there, leave this file out"
        )

    def read_some(self, key: str, count: int) -> Tensor:
        """The first `count` elements of a tensor, or all when it has fewer, flat."""
        with self.path.open("rb") as file:
            return self._read(file, key, count)

    def _read(self, file: BinaryIO, key: str, count: int | None = None) -> Tensor:
        entry = self.header.tensors[key]
        dtype, size = DTYPES[entry.dtype], entry.end - entry.start
        wanted = size if count is None else min(size, count * dtype.itemsize)
        file.seek(entry.start)
        raw = bytearray(file.read(wanted))
        if len(raw) != wanted:
            raise DamagedFileError(self.path, "became shorter while it was read; start again")
        return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Tensors that lie next to each other in every input and in the output."""

    keys: tuple[str, ...]
    elements: int
    dtype: torch.dtype
    """Of the output."""
    inputs: tuple[tuple[int, torch.dtype], ...]
    """(first byte in the file, dtype) for each file."""
    is_averaged: bool
    """False when the bytes of the reference are copied."""


def read_sources(paths: Sequence[Path]) -> tuple[Source, ...]:
    """The headers of the files, checked to hold the same adapter; ValueError names file and key."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: is gone; load the checkpoints again, or keep more of them")
    sources = tuple(Source(path=path, header=read_header(path)) for path in paths)
    for source in sources:
        _check_is_adapter(source)
    for other in sources[1:]:
        _check_same_tensors(sources[0], other)
    _check_same_alphas(sources)
    return sources


def is_averaged(key: str, sources: Sequence[Source]) -> bool:
    """Whether a tensor is averaged, not copied: alphas and integer tensors are copied."""
    return not key.endswith(ALPHA) and _is_floating(sources[0].header.tensors[key])


def output_layout(reference: Source) -> dict[str, TensorEntry]:
    """The output as safetensors would lay it out: keys, shapes and dtypes of the reference."""
    tensors = reference.header.tensors
    return saved_layout({key: (entry.dtype, entry.shape) for key, entry in tensors.items()})


def spans(sources: Sequence[Source], reference: Source) -> Iterator[Span]:
    """The output in order, in the longest runs that are contiguous in every file.

    A copied float tensor (an alpha) inside a run is averaged with it and written over afterwards.
    """
    run: list[str] = []
    for key in output_layout(reference):
        if run and not _continues(run[-1], key, sources):
            yield _span(run, sources, reference)
            run = []
        run.append(key)
    if run:
        yield _span(run, sources, reference)


def copied_inside(span: Span, sources: Sequence[Source]) -> Iterator[tuple[int, int, str]]:
    """(first element, last + 1, key) of the tensors of an averaged span that are to be copied."""
    position = 0
    for key in span.keys:
        size = math.prod(sources[0].header.tensors[key].shape)
        if not is_averaged(key, sources):
            yield position, position + size, key
        position += size


def key_at(span: Span, element: int, source: Source) -> str:
    """Which tensor of a span holds an element."""
    position = 0
    for key in span.keys:
        position += math.prod(source.header.tensors[key].shape)
        if element < position:
            return key
    raise IndexError(element)


def _continues(previous: str, key: str, sources: Sequence[Source]) -> bool:
    for source in sources:
        before, after = source.header.tensors[previous], source.header.tensors[key]
        if before.end != after.start or before.dtype != after.dtype or not _is_floating(after):
            return False
    return True


def _span(keys: list[str], sources: Sequence[Source], reference: Source) -> Span:
    tensors = reference.header.tensors
    return Span(
        keys=tuple(keys),
        elements=sum(math.prod(tensors[key].shape) for key in keys),
        dtype=DTYPES[tensors[keys[0]].dtype],
        inputs=tuple(
            (source.header.tensors[keys[0]].start, DTYPES[source.header.tensors[keys[0]].dtype])
            for source in sources
        ),
        is_averaged=any(is_averaged(key, sources) for key in keys),
    )


def _is_floating(entry: TensorEntry) -> bool:
    return DTYPES[entry.dtype].is_floating_point


def _check_is_adapter(source: Source) -> None:
    tensors = source.header.tensors
    if not any(_ADAPTER_KEY.search(key) for key in tensors):
        example = next(iter(tensors), "no tensors at all")
        raise ValueError(
            f"{source.path}: not a LoRA file (it holds {example}); choose adapter files only"
        )
    if not any(is_averaged(key, [source]) for key in tensors):
        raise DamagedFileError(source.path, "no tensor in it can be averaged; leave this file out")
    for key, entry in tensors.items():
        if key.endswith(ALPHA) and math.prod(entry.shape) != 1:
            raise DamagedFileError(
                source.path, f"{key} has shape {entry.shape}, not that of one number; {AGAIN}"
            )


def _check_same_tensors(one: Source, other: Source) -> None:
    ours, theirs = one.header.tensors, other.header.tensors
    for key in sorted(ours.keys() ^ theirs.keys()):
        has, lacks = (one, other) if key in ours else (other, one)
        raise ValueError(
            f"{lacks.path}: lacks {key}, which {has.path.name} has; "
            "all files must hold the same adapter, saved in one run"
        )
    for key, entry in theirs.items():
        if entry.shape != ours[key].shape:
            raise ValueError(
                f"{other.path}: {key} has shape {entry.shape}, but {ours[key].shape} in "
                f"{one.path.name}; all files must hold the same adapter, saved in one run"
            )
        if not key.endswith(ALPHA) and _is_floating(entry) != _is_floating(ours[key]):
            raise ValueError(
                f"{other.path}: {key} is {entry.dtype}, but {ours[key].dtype} in {one.path.name}; "
                "numbers and integers cannot be averaged, convert one of the files"
            )


def _check_same_alphas(sources: Sequence[Source]) -> None:
    keys = [key for key in sources[0].header.tensors if key.endswith(ALPHA)]
    if not keys:
        return
    ours, *others = (_alphas(source, keys) for source in sources)
    for other, theirs in zip(sources[1:], others, strict=True):
        # all at once: a call for each of hundreds of numbers takes longer than their merge
        if _close(torch.cat(list(ours.values())), torch.cat(list(theirs.values()))):
            continue
        key = next(key for key in keys if not _close(ours[key], theirs[key]))
        raise ValueError(
            f"{other.path}: {key} is {theirs[key].tolist()}, but {ours[key].tolist()} in "
            f"{sources[0].path.name}; files with different alphas scale their weights "
            "differently and cannot be averaged"
        )


def _alphas(source: Source, keys: Sequence[str]) -> dict[str, Tensor]:
    alphas = {key: value.double().flatten() for key, value in source.read_each(keys).items()}
    if not torch.cat(list(alphas.values())).isfinite().all():
        key = next(key for key in keys if not alphas[key].isfinite())
        raise source.not_finite(key, float(alphas[key]))
    return alphas


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=ALPHA_RTOL, atol=ALPHA_ATOL)
