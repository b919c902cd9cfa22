"""Files of safetensors: read once everything in their header is checked, written whole or not."""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .disk.reading import (
    AGAIN,
    MAX_JSON_BYTES,
    DamagedFileError,
    is_unicode,
    open_regular,
    parse_json,
    shown,
)
from .disk.writing import replaced_when_whole

LONGEST_NAME = 500
"""Characters in the name of a tensor; the longest that are known have 120."""
MOST_SIDES = 32
MOST_ELEMENTS = 2**48
"""Of one tensor, sides of 0 counted as 1: their product must not overflow anywhere."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    # from torch 2.7 on
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""safetensors' name of each dtype that Braid reads, in the order that safetensors sorts by."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor as the header of a safetensors file describes it."""

    dtype: str
    """safetensors' name: F32, BF16, F8_E4M3, I64 …"""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    end: int
    """One past the last byte, counted from the start of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SafetensorsHeader:
    """Everything a safetensors file says before its data."""

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]
    """In the order of the data."""
    data_start: int
    """Offset of the first data byte in the file."""


def read_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file, in which everything has been checked.

    Tensors have a known dtype and a printable name, and follow each other without a gap up to the
    end of the file, each as long as dtype and shape say. DamagedFileError when it is not so.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        (length,) = struct.unpack("<Q", prefix.ljust(8, b"\0"))
        if length > size - 8:
            raise DamagedFileError(
                path, f"not a safetensors file, or cut short ({size} bytes); {AGAIN}"
            )
        text = file.read(min(length, MAX_JSON_BYTES + 1))
    try:
        header = _checked_header(parse_json(text, deepest=3), data_start=8 + length)
    except ValueError as error:
        raise DamagedFileError(
            path, f"not a safetensors file ({error}), or damaged; {AGAIN}"
        ) from error
    end = max((entry.end for entry in header.tensors.values()), default=header.data_start)
    if end > size:
        raise DamagedFileError(path, f"cut short (needs {end} bytes, has {size}); {AGAIN}")
    if end < size:
        raise DamagedFileError(path, f"damaged ({size - end} bytes follow its last one); {AGAIN}")
    return header


def _checked_header(raw: Any, data_start: int) -> SafetensorsHeader:
    """The header from its JSON; ValueError says what is wrong with it."""
    if not isinstance(raw, dict):
        raise ValueError("its header is not an object")
    metadata = raw.pop("__metadata__", None)
    metadata = {} if metadata is None else _checked_metadata(metadata)
    found = [(name, _checked_entry(name, entry, data_start)) for name, entry in raw.items()]
    tensors = dict(sorted(found, key=lambda item: (item[1].start, item[1].end)))
    end = data_start
    for name, entry in tensors.items():
        if entry.start != end:
            raise ValueError(f"{name} starts at byte {entry.start}, the one before ends at {end}")
        end = entry.end
    return SafetensorsHeader(metadata=metadata, tensors=tensors, data_start=data_start)


def _checked_metadata(raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(text, str) for text in raw.values()):
        raise ValueError("its metadata is not all text")
    for key, text in raw.items():
        if not is_unicode(key + text):
            raise ValueError(f"its metadata {shown(key)} is no text")
    return raw


def _checked_entry(name: str, raw: Any, data_start: int) -> TensorEntry:
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a tensor is called {shown(name)}")
    match raw:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]}:
            numbers = [*shape, start, end]
        case _:
            raise ValueError(f"{name} is described by {shown(raw)}")
    if dtype not in DTYPES:
        raise ValueError(
            f"{name} has dtype {shown(dtype)}, which Braid does not read; it reads "
            f"{', '.join(DTYPES)}"
        )
    if len(shape) > MOST_SIDES or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"{name} has shape {shown(shape)} and lies at {shown([start, end])}")
    if math.prod(max(side, 1) for side in shape) > MOST_ELEMENTS:
        raise ValueError(f"{name} has shape {shown(shape)}")
    takes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != takes:
        raise ValueError(
            f"{name} takes {end - start} bytes where {dtype} of shape {tuple(shape)} takes {takes}"
        )
    return TensorEntry(
        dtype=dtype, shape=tuple(shape), start=data_start + start, end=data_start + end
    )


def saved_layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> dict[str, TensorEntry]:
    """Where safetensors would put tensors of (dtype name, shape), counted from the first data byte.

    Its order is the larger dtype first, then by name.
    """
    rank = {dtype: index for index, dtype in enumerate(DTYPES)}
    layout, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-rank[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        layout[name] = TensorEntry(dtype=dtype, shape=shape, start=start, end=end)
    return layout


def header_bytes(layout: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file with this layout, padded to 8 as safetensors pads."""
    described = {
        name: {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [entry.start, entry.end],
        }
        for name, entry in layout.items()
    }
    text = json.dumps(
        {"__metadata__": dict(metadata), **described}, separators=(",", ":"), ensure_ascii=False
    ).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file in memory of their own; DamagedFileError as `read_header`.

    safetensors maps them: Windows would not let the file be replaced while they are in use, and
    what another program writes over it would be seen in them.
    """
    return {key: tensor.clone() for key, tensor in mapped_tensors(path).items()}


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, read from it as they are used; errors likewise."""
    read_header(path)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise DamagedFileError(path, f"not a safetensors file ({error}); {AGAIN}") from error


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write `tensors` and string `metadata`, one tensor at a time; whole or not at all.

    safetensors' own writer needs a copy of every tensor first, has a temporary file of its own that
    a killed process leaves, and makes the file readable for its owner alone. `check` gets the
    written file before it takes its place. NotWrittenError says what went wrong.
    """
    layout = saved_layout({k: (_dtype_name(k, t), tuple(t.shape)) for k, t in tensors.items()})
    header = header_bytes(layout, metadata)
    size = len(header) + max((entry.end for entry in layout.values()), default=0)
    with replaced_when_whole(path, size) as file:
        file.write(header)
        for name in layout:
            flat = tensors[name].detach().cpu().contiguous().view(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)
        if check:
            check(file.path)


def _dtype_name(key: str, tensor: Tensor) -> str:
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"{key} is {tensor.dtype}, which no safetensors file of Braid's holds")
    return DTYPE_NAMES[tensor.dtype]
