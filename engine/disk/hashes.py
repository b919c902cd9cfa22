"""The hashes that LoRA managers look for, as kohya's tools compute them."""

import hashlib
import struct
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

from ..files import TensorEntry, header_bytes

LEGACY_HASH_OFFSET = 0x100000
LEGACY_HASH_LENGTH = 0x10000


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
