"""Safetensors files, changed at random where their header says what is what."""

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from .mutate import TEXTS, mutated_bytes, mutated_json, mutated_text, other_value

SIZES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
} | dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
UNKNOWN = ("F4", "F6_E2M3", "f32", "", "C64", "F128")
MARKS = (
    ".weight",
    ".alpha",
    "lora_down",
    "lora_up",
    "w1_a",
    "w2_b",
    "/",
    "weight_scale",
    "comfy_quant",
)


@dataclass(slots=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass(slots=True)
class Parts:
    """A file taken apart."""

    metadata: dict[str, str]
    tensors: dict[str, Entry]


def taken_apart(data: bytes) -> Parts:
    """A well-formed file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    metadata = header.pop("__metadata__", {})
    return Parts(
        metadata,
        {
            name: Entry(e["dtype"], e["shape"], body[slice(*e["data_offsets"])])
            for name, e in header.items()
        },
    )


def header_of(parts: Parts) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": parts.metadata} if parts.metadata else {}
    start = 0
    for name, entry in parts.tensors.items():
        offsets = [start, start + len(entry.data)]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        start = offsets[1]
    return header


def put_together(parts: Parts, header: str | None = None) -> bytes:
    """The file, with another header if one is given."""
    text = (header or json.dumps(header_of(parts))).encode("utf-8", "surrogatepass")
    body = b"".join(entry.data for entry in parts.tensors.values())
    return struct.pack("<Q", len(text)) + text + body


def mutated_container(
    rng: Random, files: Sequence[bytes], finish: Callable[[Parts], None] | None = None
) -> bytes:
    """One of the files: a few parts other ones, or its header at odds with its data, or its bytes.

    `finish` makes parts consistent again, such as a checksum; not always.
    """
    data, how = rng.choice(files), rng.random()
    if how < 0.15:
        return mutated_bytes(rng, data, rng.choice(files))
    if how < 0.16:
        return bomb(rng)
    parts = taken_apart(data)
    if how < 0.35:
        return put_together(parts, mutated_json(rng, header_of(parts)))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change_part(rng, parts)
    if finish and rng.random() < 0.9:
        finish(parts)
    return put_together(parts)


def bomb(rng: Random) -> bytes:
    """A header that is small on disk and large, or endlessly deep, once it is parsed."""
    count = rng.choice((1000, 100_000, 1_000_000))
    text = rng.choice(
        (
            "[" * count,
            '{"a":' * count,
            '{"a":[' + "[]," * count + "[]]}",
            "{" + ",".join(f'"{i:x}":{{}}' for i in range(count // 10)) + "}",
            '{"a":{"dtype":"F32","shape":[' + "1," * count + '1],"data_offsets":[0,4]}}',
            '{"__metadata__":{"a":"' + "\\u0041" * count + '"}}',
        )
    ).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


def change_part(rng: Random, parts: Parts) -> None:
    """One tensor, or one word of the metadata, is another one; the file stays well-formed."""
    if parts.metadata and rng.random() < 0.4 or not parts.tensors:
        key = rng.choice([*parts.metadata, rng.choice(TEXTS)])
        parts.metadata[key] = _other_words(rng, parts.metadata.get(key, ""))
        if rng.random() < 0.1:
            del parts.metadata[key]
        return
    name = rng.choice(list(parts.tensors))
    entry = parts.tensors[name]
    match rng.randrange(8):
        case 0:
            del parts.tensors[name]
        case 1:
            parts.tensors[_other_name(rng, name, parts)] = parts.tensors.pop(name)
        case 2:
            other = rng.choice(list(parts.tensors))
            parts.tensors[name], parts.tensors[other] = parts.tensors[other], entry
        case 3 | 4:
            _reshape(rng, entry)
        case 5:
            _retype(rng, entry)
        case 6 if entry.dtype == "U8" and entry.data[:1] == b"{":
            words = _other_words(rng, entry.data.decode("utf-8", "replace"))
            entry.data = words.encode("utf-8", "surrogatepass")
            entry.shape = [len(entry.data)]
        case _:
            entry.data = _other_values(rng, entry)


def _other_words(rng: Random, text: str) -> str:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return str(other_value(rng, text))
    return mutated_json(rng, tree) if rng.random() < 0.9 else mutated_text(rng, [text])


def _other_name(rng: Random, name: str, parts: Parts) -> str:
    if rng.random() < 0.3:
        return mutated_text(rng, list(parts.tensors))[:2000]
    return name.replace(rng.choice(MARKS), rng.choice(MARKS))


def _reshape(rng: Random, entry: Entry) -> None:
    """As many elements in other sides, or none, or fewer."""
    size = SIZES.get(entry.dtype, 1)
    count = len(entry.data) // size
    match rng.randrange(6):
        case 0:
            entry.shape = entry.shape[::-1]
        case 1:
            entry.shape = [count]
        case 2:
            entry.shape = rng.choice(([1, count], [count, 1], [1, *entry.shape], [*entry.shape, 1]))
        case 3:
            large = rng.choice((0, 1, 2**20, 2**47, 2**62))
            entry.shape, entry.data = rng.choice(([0], [large, 0], [0, large, large])), b""
        case 4 if count:
            entry.shape, entry.data = [], entry.data[:size]
        case _:
            kept = rng.randrange(count + 1)
            side = next((n for n in (8, 4, 2) if kept and kept % n == 0), 1)
            entry.shape, entry.data = [kept // side, side], entry.data[: kept * size]


def _retype(rng: Random, entry: Entry) -> None:
    """The same shape in another dtype, or, rarely, in one that there is not."""
    count = len(entry.data) // SIZES.get(entry.dtype, 1)
    entry.dtype = rng.choice(UNKNOWN) if rng.random() < 0.1 else rng.choice(list(SIZES))
    entry.data = rng.randbytes(count * SIZES.get(entry.dtype, 1))


def _other_values(rng: Random, entry: Entry) -> bytes:
    size = len(entry.data)
    if entry.dtype in ("F32", "F64") and rng.random() < 0.6:
        kind = np.float32 if entry.dtype == "F32" else np.float64
        value = rng.choice((np.nan, np.inf, 0.0, -1.0, 3e38, 1e-45, 1e9))
        values = np.frombuffer(entry.data, kind).copy()
        values[rng.randrange(max(len(values), 1)) :] = value
        return values.tobytes()
    return rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))


def with_checksum(parts: Parts) -> None:
    """The CRC-32 of a training state, as `write_state` puts it in."""
    checksum = zlib.crc32(parts.metadata.get("state", "").encode("utf-8", "surrogatepass"))
    for name in sorted(parts.tensors):
        name_bytes = name.encode("utf-8", "surrogatepass")
        checksum = zlib.crc32(parts.tensors[name].data, zlib.crc32(name_bytes, checksum))
    parts.metadata["crc32"] = f"{checksum:08x}"
