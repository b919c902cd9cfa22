"""Codes × scale → weights, exact in float32 and rounded once to the dtype that is asked for."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18
"""Elements worked on at a time on a CPU: 1 MiB in float32, which stays in cache."""
DEVICE_CHUNK_ELEMENTS = 1 << 24
_WORD_OF_PAIR = {2: torch.int32, 4: torch.int64}
FIRST_CAPABILITY_WITH_FP8 = (8, 9)


def row_chunks(out_features: int, in_features: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that fit the working memory of `device`."""
    elements = CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    rows = max(1, elements // max(1, in_features))
    for start in range(0, out_features, rows):
        yield slice(start, min(start + rows, out_features))


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that `codes` [out, in] and `scale` stand for.

    `scale` is float32: 0-d for the tensor, [out, 1] per channel, [out, blocks, 1] per block. It is
    multiplied in float32, so the result is within half a unit in the last place of `dtype`.
    """
    if torch.compiler.is_compiling():
        return _traced(codes, scale, dtype)
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    chunks = list(row_chunks(codes.shape[0], codes.shape[1], codes.device))
    buffers = _decoding_buffers(codes[chunks[0]]) if chunks and _has_pairs(codes) else None
    for rows in chunks:
        part = codes[rows]
        values = part.to(torch.float32) if buffers is None else _decode_into(part, *buffers)
        values.view(len(values), *_groups(scale), -1).mul_(scale[rows] if scale.ndim else scale)
        weight[rows] = values
    return weight


def _groups(scale: Tensor) -> tuple[int, ...]:
    return (scale.shape[1],) if scale.ndim == 3 else ()


def _traced(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in one expression, for a compiler to fuse.

    Triton cannot read float8_e4m3fn ("fp8e4nv") on cards before Ada: there the bytes are looked up.
    """
    if codes.is_cuda and torch.cuda.get_device_capability() < FIRST_CAPABILITY_WITH_FP8:
        values = decode_bytes(codes)
    else:
        values = codes.to(torch.float32)
    return (values.view(codes.shape[0], *_groups(scale), -1) * scale).view(codes.shape).to(dtype)


def decode_bytes(codes: Tensor) -> Tensor:
    """Codes as float32 without any FP8 arithmetic: a 256-entry table indexed by the bytes."""
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(torch.float32)
    return table.to(codes.device)[codes.view(torch.uint8).to(torch.int32)]


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes -> their exact values in `dtype`, without a scale.

    A CPU converts FP8 slowly; two codes at a time, read as one index into a table of 65536 pairs,
    take a seventh of the time.
    """
    if not _has_pairs(codes):
        return codes.to(dtype)
    return _decode_into(codes, *_decoding_buffers(codes, dtype))


def _has_pairs(codes: Tensor) -> bool:
    return codes.device.type == "cpu" and codes.shape[-1] % 2 == 0 and codes.is_contiguous()


def _decoding_buffers(codes: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Index and values for `codes`, or for fewer of them: making them anew takes a quarter more."""
    index = torch.empty(codes.numel() // 2, dtype=torch.int32)
    return index, torch.empty(codes.shape, dtype=dtype)


def _decode_into(codes: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Fill the start of `values` with the values of `codes` (contiguous, of an even width)."""
    index, values = index[: codes.numel() // 2], values[: len(codes)]
    index.copy_(codes.view(-1).view(torch.uint8).view(torch.uint16))
    words = values.view(-1).view(_WORD_OF_PAIR[values.dtype.itemsize])
    torch.index_select(_pair_table(codes.dtype, values.dtype), 0, index, out=words)
    return values


@lru_cache(maxsize=8)
def _pair_table(fp8: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The values of every pair of codes, both in one integer: [65536]."""
    with torch.inference_mode(False):
        pairs = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
        return pairs.view(torch.uint8).view(fp8).to(dtype).view(_WORD_OF_PAIR[dtype.itemsize])
