"""Files of safetensors, read and written, and the hashes that LoRA managers look for."""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .writing import replaced_when_whole

LEGACY_HASH_OFFSET = 0x100000
LEGACY_HASH_LENGTH = 0x10000
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

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
    """The header of a safetensors file; ValueError when the file is not one or is cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path}: not a safetensors file (only {len(prefix)} bytes)")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        text = file.read(length)
    try:
        header = _parsed_header(text, data_start=8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # without the error, which may quote the file: it is anybody's
        raise ValueError(f"{path}: not a safetensors file (its header is damaged)") from None
    end = max((entry.end for entry in header.tensors.values()), default=header.data_start)
    if end > size:
        raise ValueError(
            f"{path}: cut short (needs {end} bytes, has {size}); copy or save it again"
        )
    return header


def _parsed_header(text: bytes, data_start: int) -> SafetensorsHeader:
    """The header from its JSON; any of the errors that `read_header` catches where it is wrong."""
    raw = json.loads(text)
    metadata = raw.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not all text")
    tensors = {}
    for name, entry in sorted(raw.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if not 0 <= start <= end:
            raise ValueError(f"{name} lies at {start} to {end}")
        tensors[name] = TensorEntry(
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=data_start + start,
            end=data_start + end,
        )
    return SafetensorsHeader(metadata=metadata, tensors=tensors, data_start=data_start)


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


class SshsHasher:
    """The hashes of `sshs_hashes` from the data bytes as they stream past."""

    def __init__(self, layout: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        self._model = hashlib.sha256()
        self._legacy = hashlib.sha256()
        self._position = 0  # in the serialisation that holds only the `ss_` metadata
        self._hash_legacy(header_bytes(layout, _ss_metadata(metadata)))

    def update(self, data: memoryview) -> None:
        """The next bytes of the data section."""
        self._model.update(data)
        self._hash_legacy(data)

    def hashes(self) -> dict[str, str]:
        """`sshs_model_hash` and `sshs_legacy_hash`, once all data has passed."""
        return {
            "sshs_model_hash": self._model.hexdigest(),
            "sshs_legacy_hash": self._legacy.hexdigest()[:8],
        }

    def _hash_legacy(self, data: bytes | memoryview) -> None:
        start = max(LEGACY_HASH_OFFSET - self._position, 0)
        stop = max(LEGACY_HASH_OFFSET + LEGACY_HASH_LENGTH - self._position, 0)
        self._legacy.update(data[start:stop])
        self._position += len(data)


def _ss_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


def sshs_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` as kohya's tools compute them.

    Both are taken from a serialisation whose header holds only the `ss_…` metadata: the model hash
    is the SHA-256 of everything after the header, the legacy hash the first 8 hex digits of the
    SHA-256 of 64 KiB at offset 1 MiB.
    """
    data = memoryview(safetensors.torch.save(dict(tensors), _ss_metadata(metadata)))
    (length,) = struct.unpack("<Q", data[:8])
    legacy = data[LEGACY_HASH_OFFSET : LEGACY_HASH_OFFSET + LEGACY_HASH_LENGTH]
    return {
        "sshs_model_hash": hashlib.sha256(data[8 + length :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file in memory of their own.

    safetensors maps them: Windows would not let the file be replaced while they are in use, and
    what another program writes over it would be seen in them.
    """
    return {key: tensor.clone() for key, tensor in safetensors.torch.load_file(path).items()}


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
                file.write(memoryview(flat.view(torch.uint8).numpy()))
        if check:
            check(file.path)


def _dtype_name(key: str, tensor: Tensor) -> str:
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"{key} is {tensor.dtype}, which no safetensors file of Braid's holds")
    return DTYPE_NAMES[tensor.dtype]
