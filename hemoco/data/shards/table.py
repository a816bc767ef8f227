"""Where the images of a shard lie: what makes range reads and the naming of single damaged samples possible.

Shapes: M samples of a shard.
"""

import hashlib
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

_DIGEST = "sha256"  # a column of its own


class SampleTable(NamedTuple):
    """Where the images of a shard lie, so that single ones can be read and verified."""

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
    """CRC32C of the bytes of a sample, by which its table tells whether they are the packed ones."""
    return int(google_crc32c.value(bytes(data)))


def encode_table(table: SampleTable) -> bytes:
    """A table as the bytes of a safetensors file."""
    import safetensors.numpy

    # one string, for an array of strings would be as wide as the longest; keys hold no NUL
    keys = np.frombuffer("\0".join(table.keys).encode("utf-8", "surrogateescape"), np.uint8)
    columns = table._asdict() | {"keys": keys}
    data: bytes = safetensors.numpy.save(columns | {_DIGEST: _digest_of(columns)})
    return data


def decode_table(data: bytes) -> SampleTable:
    """A table from the bytes of its file.

    Raises:
        ValueError: damaged.
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
