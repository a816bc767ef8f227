"""The table of a shard's samples: the bytes at which its images lie, and their checksums.

With it a reader fetches single samples by range, and finds which samples of a shard are damaged.

Shapes: M samples of a shard.
"""

import hashlib
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

_DIGEST = "sha256"  # column with the checksum of the other columns


class SampleTable(NamedTuple):
    """Position, checksum and label of each image in a shard."""

    keys: list[str]
    offsets: NDArray[np.int64]
    """First byte in the tar file (M,)."""
    sizes: NDArray[np.int64]
    """Bytes (M,)."""
    crcs: NDArray[np.uint32]
    """CRC32C (M,)."""
    labels: NDArray[np.int64]
    """Class indices (M,), -1 where there is none."""
    suffixes: NDArray[np.uint8]
    """Positions in `IMAGE_SUFFIXES` (M,)."""


def crc32c(data: bytes | memoryview) -> int:
    """CRC32C of the bytes of a sample."""
    return int(google_crc32c.value(bytes(data)))


def encode_table(table: SampleTable) -> bytes:
    """The bytes of a table's safetensors file."""
    import safetensors.numpy

    # One string, separated by NUL, which no key contains: in an array of strings, each would take
    # as much memory as the longest.
    keys = np.frombuffer("\0".join(table.keys).encode("utf-8", "surrogateescape"), np.uint8)
    columns = table._asdict() | {"keys": keys}
    data: bytes = safetensors.numpy.save(columns | {_DIGEST: _digest_of(columns)})
    return data


def decode_table(data: bytes) -> SampleTable:
    """Reads a table from the bytes of its file.

    Raises:
        ValueError: the file is damaged.
    """
    import safetensors.numpy

    try:
        columns = safetensors.numpy.load(data)
        if not np.array_equal(columns.pop(_DIGEST), _digest_of(columns)):
            raise ValueError("its checksum differs")
        text = columns.pop("keys").tobytes().decode("utf-8", "surrogateescape")
        table = SampleTable(text.split("\0") if len(columns["offsets"]) else [], **columns)
        lengths = {len(column) for column in table}
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
    if len(lengths) != 1:
        raise ValueError("its columns differ in length")
    return table


def _digest_of(columns: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """SHA-256 of all columns (32,)."""
    joined = b"".join(columns[name].tobytes() for name in sorted(columns))
    return np.frombuffer(hashlib.sha256(joined).digest(), np.uint8)
