"""Averages adapter files as streams of bytes: one small chunk of each file in memory at a time."""

from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..disk.hashes import SshsHasher
from ..disk.writing import replaced_when_whole
from ..files import DTYPES, header_bytes
from .layout import Source, Span, copied_inside, key_at, output_layout, read_sources, spans

CHUNK_ELEMENTS = 1 << 18
"""1 MiB of float32: small enough for a cache, large enough to hide the calls."""
NO_HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}


class Progress(NamedTuple):
    """How far an average has come, in bytes, modules or tensors."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Files that fit together and the decays that average them."""

    sources: tuple[Source, ...]
    """In training order."""
    betas: tuple[float, ...]
    """One per source after the first: average = beta * average + (1 - beta) * source."""
    like_musubi: bool
    """Write what musubi-tuner's script writes: dtypes, alphas and integer tensors of the first file
    and no `modelspec.merged_from`. Otherwise the last file is the reference for all of them."""

    @property
    def reference_index(self) -> int:
        """Which source gives the dtypes and the copied tensors."""
        return 0 if self.like_musubi else len(self.sources) - 1

    @property
    def reference(self) -> Source:
        """The source that gives the dtypes and the copied tensors."""
        return self.sources[self.reference_index]

    @property
    def metadata(self) -> dict[str, str]:
        """That of the last file, with where the merge came from and without the hashes."""
        last = self.sources[-1].header.metadata
        metadata = {key: value for key, value in last.items() if key not in NO_HASHES}
        if not self.like_musubi:
            metadata["modelspec.merged_from"] = ", ".join(s.path.stem for s in self.sources)
        return metadata


def prepare_merge(paths: Sequence[Path], betas: Sequence[float], like_musubi: bool) -> Merge:
    """Open the headers and refuse, naming file and key, whatever cannot be averaged."""
    if not paths:
        raise ValueError("no checkpoints to average; choose at least one")
    if len(betas) != len(paths) - 1:
        raise ValueError(f"{len(betas)} betas for {len(paths)} files; need one less than files")
    return Merge(
        sources=read_sources(paths),
        betas=tuple(float(beta) for beta in betas),
        like_musubi=like_musubi,
    )


def write_merged(merge: Merge, output: Path) -> Iterator[Progress]:
    """Write the average to `output`, whole or not at all, with kohya's hashes in its metadata."""
    if output.resolve() in {source.path.resolve() for source in merge.sources}:
        raise ValueError(f"{output}: is one of the files to merge; choose another name")
    layout = output_layout(merge.reference)
    hasher = SshsHasher(layout, merge.metadata)
    header = header_bytes(layout, merge.metadata | NO_HASHES)
    size = len(header) + max((entry.end for entry in layout.values()), default=0)
    with replaced_when_whole(output, size) as file:
        file.write(header)

        def store(chunk: memoryview) -> None:
            file.write(chunk)
            hasher.update(chunk)

        with ThreadPoolExecutor(max_workers=1) as beside:  # stores one while the next is averaged
            storing: Future[None] | None = None
            for chunk, progress in _merged_bytes(merge):
                if storing:
                    storing.result()
                storing = beside.submit(store, chunk)
                yield progress
            if storing:
                storing.result()
        file.seek(0)
        file.write(header_bytes(layout, merge.metadata | hasher.hashes()))


def merged_tensors(merge: Merge) -> Generator[Progress, None, dict[str, Tensor]]:
    """The average as a state dict in memory, for a graph that saves no file."""
    layout = output_layout(merge.reference)
    data = bytearray(max((entry.end for entry in layout.values()), default=0))
    position = 0
    for chunk, progress in _merged_bytes(merge):
        data[position : position + len(chunk)] = chunk
        position += len(chunk)
        yield progress
    flat = torch.frombuffer(data, dtype=torch.uint8)
    return {
        key: flat[entry.start : entry.end].view(DTYPES[entry.dtype]).reshape(entry.shape)
        for key, entry in layout.items()
    }


def _merged_bytes(merge: Merge) -> Iterator[tuple[memoryview, Progress]]:
    """The data section of the output in order; a chunk stays valid while the next one is made."""
    total = sum(entry.end - entry.start for entry in output_layout(merge.reference).values())
    done = 0
    with ExitStack() as stack:
        files = [stack.enter_context(s.path.open("rb", buffering=0)) for s in merge.sources]
        chunks = _Chunks(merge, files)
        for span in spans(merge.sources, merge.reference):
            overlays = _overlays(span, merge)
            for first in range(0, span.elements, CHUNK_ELEMENTS):
                last = min(first + CHUNK_ELEMENTS, span.elements)
                with _on_one_thread():
                    values = chunks.merged(span, first, last)
                    _lay_over(values, overlays, first, last)
                data = values.view(torch.uint8).numpy().data
                done += len(data)
                yield data, Progress(done, total)


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """Threads that share a chunk wait for each other: 40 x slower beside a busy neighbour."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Chunks:
    """Reads and averages the files piece by piece in a few buffers."""

    def __init__(self, merge: Merge, files: Sequence[FileIO]) -> None:
        self._merge = merge
        self._files = files
        self._raw = torch.empty(CHUNK_ELEMENTS * 8, dtype=torch.uint8)
        self._values = torch.empty(CHUNK_ELEMENTS, dtype=torch.float32)
        self._average = torch.empty(CHUNK_ELEMENTS, dtype=torch.float32)
        self._outputs = cycle([torch.empty_like(self._raw), torch.empty_like(self._raw)])

    def merged(self, span: Span, first: int, last: int) -> Tensor:
        """Elements `first` to `last` of a span in the dtype of the output.

        Valid until the call after the next one.
        """
        output = next(self._outputs)
        if not span.is_averaged:
            return self._read(self._merge.reference_index, span, first, last, output)
        average = self._average[: last - first]
        values = self._values[: last - first]
        average.copy_(self._read(0, span, first, last, self._raw))
        for index, beta in enumerate(self._merge.betas, start=1):
            # each product is rounded before the sum: musubi's result, bit for bit
            values.copy_(self._read(index, span, first, last, self._raw)).mul_(1 - beta)
            average.mul_(beta).add_(values)
        if not average.sum().isfinite():
            self._check_finite(span, first, last)
        return output.view(span.dtype)[: last - first].copy_(average)

    def _read(self, index: int, span: Span, first: int, last: int, buffer: Tensor) -> Tensor:
        """The same elements of one file in `buffer`, in the file's own dtype."""
        start, dtype = span.inputs[index]
        raw = buffer[: (last - first) * dtype.itemsize]
        file = self._files[index]
        file.seek(start + first * dtype.itemsize)
        if file.readinto(raw.numpy().data) != len(raw):
            raise ValueError(f"{file.name}: became shorter while it was read; start again")
        return raw.view(dtype)

    def _check_finite(self, span: Span, first: int, last: int) -> None:
        """Name the file and the tensor that hold NaN or infinity between two elements."""
        for index, source in enumerate(self._merge.sources):
            values = self._read(index, span, first, last, self._raw).float()
            bad = (~values.isfinite()).nonzero()
            if len(bad):
                key = key_at(span, first + int(bad[0]), source)
                raise source.not_finite(key, float(values[bad[0]]))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Overlay:
    """A copied tensor inside an averaged span."""

    first: int
    last: int
    values: Tensor


def _overlays(span: Span, merge: Merge) -> list[_Overlay]:
    if not span.is_averaged:
        return []
    inside = list(copied_inside(span, merge.sources))
    values = merge.reference.read_each(key for _, _, key in inside)
    return [
        _Overlay(first=first, last=last, values=values[key].flatten())
        for first, last, key in inside
    ]


def _lay_over(values: Tensor, overlays: list[_Overlay], first: int, last: int) -> None:
    """Write the copied tensors over elements `first` to `last` of a span."""
    begin = bisect_right(overlays, first, key=lambda overlay: overlay.last)
    for overlay in overlays[begin:]:
        if overlay.first >= last:
            return
        low, high = max(overlay.first, first), min(overlay.last, last)
        kept = overlay.values[low - overlay.first : high - overlay.first]
        values[low - first : high - first] = kept
