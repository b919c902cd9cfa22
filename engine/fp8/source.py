"""The tensors of a model's safetensors file, or of its shards, mapped and not read."""

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import DTYPES, TensorEntry, read_header

SHARD = re.compile(r"^(?P<stem>.*-)(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors)$")

MISSING_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSource:
    """What one or several safetensors files hold."""

    tensors: dict[str, Tensor]
    """In file order. Views that keep the files mapped; what is written to them stays in memory."""
    metadata: dict[str, str]
    """The headers' string metadata, merged."""
    files: tuple[Path, ...]


def shards_of(path: Path) -> tuple[Path, ...]:
    """`path` alone, or all of `…-0000i-of-0000n.safetensors`; ValueError names what is missing."""
    match = SHARD.match(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    files = [
        path.with_name(f"{match['stem']}{index:05d}-of-{count:05d}{match['suffix']}")
        for index in range(1, count + 1)
    ]
    if missing := [file.name for file in files if not file.is_file()]:
        some = ", ".join(missing[:MISSING_SHOWN]) + (" …" if len(missing) > MISSING_SHOWN else "")
        raise ValueError(f"{path.name} is one of {count} shards; missing: {some}")
    return tuple(files)


def map_tensors(path: Path) -> TensorSource:
    """Map a safetensors file and its sibling shards; ValueError says what cannot be read."""
    if path.suffix not in (".safetensors", ".sft"):
        raise ValueError(
            f"{path.name}: only .safetensors files are quantised while they are read; "
            "load it with Load Diffusion Model and save it again"
        )
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    files = shards_of(path)
    for file in files:
        header = read_header(file)
        metadata.update(header.metadata)
        with file.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, entry in header.tensors.items():
            tensors[name] = _view(mapped, entry)
    return TensorSource(tensors=tensors, metadata=metadata, files=files)


def _view(mapped: mmap.mmap, entry: TensorEntry) -> Tensor:
    dtype, length = DTYPES[entry.dtype], entry.end - entry.start
    if length == 0:
        return torch.empty(entry.shape, dtype=dtype)
    values = torch.frombuffer(mapped, dtype=torch.uint8, count=length, offset=entry.start)
    if values.data_ptr() % dtype.itemsize:
        values = values.clone()  # an unaligned view is undefined behaviour on some processors
    return values.view(dtype).view(entry.shape)
