"""Features of a data set as Parquet files, one per shard, for any program that reads Parquet.

Columns: `key`, `split`, `label` and `class_name` (both null for an image without a label) and
`feature`, a list of F numbers. The schema's metadata records, under names that start with
`hemoco.`, what the features depend on and which samples were left out.

Shapes: M images of a shard, F features.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hemoco.data.stream.bad_samples import BadSample
from hemoco.errors import UsageError
from hemoco.storage.objects import filesystem, join_url, list_names, storage_errors

FORMAT = "hemoco-embedding-1"
BAD_SAMPLES_NAME = "_bad_samples.jsonl"
"""A file beside the Parquet files; Parquet readers skip names that start with an underscore."""
FILES_AT_ONCE = 16
"""Number of files that are read concurrently."""
_SUFFIX, _PREFIX = ".parquet", "hemoco."
_IMAGES, _BAD = "images", "bad_samples"
_TAIL_BYTES = 64 * 1024  # of a file's end, read first; contains the footer of most files
_MAGIC = b"PAR1"


class FeatureRows(NamedTuple):
    """The images of one shard, without those that were left out."""

    keys: list[str]
    """Keys as returned by `key_text`, unique in the shard."""
    split: str
    labels: NDArray[np.int64]
    """Classes (M,), -1 for an image without a label."""
    features: NDArray[np.floating[Any]]
    """float32 or float16 (M, F)."""


class FeatureFile(NamedTuple):
    """The metadata of a file."""

    about: dict[str, str]
    """Inputs and origin of the features."""
    images: int
    """M."""
    bad: tuple[BadSample, ...]
    """Samples of the shard that were left out."""


def file_name(shard: str) -> str:
    """The name of the file for a shard.

    Args:
        shard: name of the shard in the index; for tars that hemoco did not pack it may be a URL,
            of which the file name then has the last part and a digest.
    """
    stem = shard.removesuffix(".tar")
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", stem):
        return stem + _SUFFIX
    return f"{stem.rpartition('/')[2]}-{hashlib.sha256(shard.encode()).hexdigest()[:16]}{_SUFFIX}"


def key_text(key: str) -> str:
    """A sample's key as text; bytes that are not UTF-8 are escaped, as in `\\xff`."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def list_files(url: str) -> list[str]:
    """Names of the Parquet files in a folder, sorted.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    return [name for name in list_names(url) if name.endswith(_SUFFIX)]


def encode_file(
    rows: FeatureRows, classes: Sequence[str], about: Mapping[str, str], bad: Iterable[BadSample]
) -> bytes:
    """Encodes the features of a shard as a Parquet file.

    Args:
        rows: the images and their features.
        classes: class names by label.
        about: inputs and origin of the features, for the metadata.
        bad: samples that were left out, for the metadata.
    """
    metadata = {
        **about,
        _IMAGES: str(len(rows.keys)),
        _BAD: json.dumps([sample._asdict() for sample in bad]),
    }
    width = rows.features.shape[1]  # F
    feature_type = pa.list_(pa.from_numpy_dtype(rows.features.dtype), width)
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("class_name", pa.string()),
        pa.field("feature", feature_type, nullable=False),
    ]
    names = [
        classes[label] if 0 <= label < len(classes) else None for label in rows.labels.tolist()
    ]
    columns = [
        pa.array(rows.keys, pa.string()),
        pa.array([rows.split] * len(rows.keys), pa.string()),
        pa.array(rows.labels, mask=rows.labels < 0),
        pa.array(names, pa.string()),
        pa.FixedSizeListArray.from_arrays(pa.array(rows.features.reshape(-1)), width),
    ]
    schema = pa.schema(fields, {_PREFIX + name: value for name, value in metadata.items()})
    table = pa.Table.from_arrays(columns, schema=schema)
    buffer = io.BytesIO()
    # Features and keys get no dictionary, since hardly two values are equal.
    pq.write_table(table, buffer, compression="zstd", use_dictionary=["split", "class_name"])
    return buffer.getvalue()


def read_files(url: str, names: Sequence[str]) -> list[FeatureFile]:
    """Reads the metadata of files in a folder, without their rows.

    Raises:
        UsageError: a file is not a Parquet file with features from hemoco.
        StorageError: the storage refuses or does not answer.
    """
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        return list(threads.map(lambda name: _read_footer(join_url(url, name)), names))


def parse_file(url: str, metadata: Mapping[bytes, bytes] | None) -> FeatureFile:
    """Parses the metadata of a file's schema.

    Args:
        url: URL of the file, for messages.
        metadata: metadata of the schema.

    Raises:
        UsageError: the metadata is not that of features from hemoco.
    """
    about: dict[str, str] = {}
    for name, value in (metadata or {}).items():
        if name.startswith(_PREFIX.encode()):
            about[name.decode().removeprefix(_PREFIX)] = value.decode()
    if about.get("format") != FORMAT:
        raise UsageError(
            f"{url}: holds no features of hemoco (format {about.get('format')}, this version reads "
            f"{FORMAT}); remove it or name another folder"
        )
    bad = tuple(BadSample(**fields) for fields in json.loads(about.pop(_BAD)))
    images = int(about.pop(_IMAGES))
    return FeatureFile(about, images, bad)


def not_parquet(url: str, error: Exception) -> UsageError:
    """The error for a file that Arrow cannot read."""
    return UsageError(
        f"{url}: is not a complete Parquet file ({error}); remove it, `python -m jobs embed` makes "
        "it again"
    )


def _read_footer(url: str) -> FeatureFile:
    """Reads the footer of a file, from its last bytes only.

    A Parquet file ends with the footer, its length in four bytes, and PAR1.
    """
    tail = _tail(url, _TAIL_BYTES)
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if tail.endswith(_MAGIC) and needed > len(tail):
        tail = _tail(url, needed)
    try:
        metadata = pq.read_metadata(pa.BufferReader(tail)).metadata
    except pa.ArrowException as error:
        raise not_parquet(url, error) from error
    return parse_file(url, metadata)


def _tail(url: str, size: int) -> bytes:
    """The last `size` bytes of an object, or all of a smaller one."""
    with storage_errors(url):
        fs, path = filesystem(url)
        return bytes(fs.cat_file(path, start=-size))
