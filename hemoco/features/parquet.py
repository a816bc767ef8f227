"""Features of a data set as Parquet files, one for each shard, for any program that reads Parquet.

Columns: `key`, `split`, `label` and `class_name` (null where there is none) and `feature`, a list of F numbers. The
schema's metadata says under `hemoco.` names what they follow from, and which samples were left out.

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
"""In the folder of the files; who reads a folder of Parquet passes over what begins with an underscore."""
FILES_AT_ONCE = 16
_SUFFIX, _PREFIX = ".parquet", "hemoco."
_IMAGES, _BAD = "images", "bad_samples"
_TAIL_BYTES = 64 * 1024
_MAGIC = b"PAR1"


class FeatureRows(NamedTuple):
    """The images of one shard, but for those that were left out."""

    keys: list[str]
    """Unique in their shard, as `key_text` gives them."""
    split: str
    labels: NDArray[np.int64]
    """Classes (M,), -1 where there is none."""
    features: NDArray[np.floating[Any]]
    """float32 or float16 (M, F)."""


class FeatureFile(NamedTuple):
    """What the metadata of a file says."""

    about: dict[str, str]
    """What its features follow from, and where they come from."""
    images: int
    """M."""
    bad: tuple[BadSample, ...]
    """Samples of the shard that were left out."""


def file_name(shard: str) -> str:
    """The name of a shard's file, by the shard's name in the index; tars of others may have URLs for names."""
    stem = shard.removesuffix(".tar")
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", stem):
        return stem + _SUFFIX
    return f"{stem.rpartition('/')[2]}-{hashlib.sha256(shard.encode()).hexdigest()[:16]}{_SUFFIX}"


def key_text(key: str) -> str:
    """A key of a sample as it stands in the files: bytes of it that are not UTF-8 are written out, like `\\xff`."""
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
    """A file's bytes.

    Args:
        rows: its content.
        classes: names of the labels.
        about: what the features follow from, and where they come from.
        bad: samples that were left out.
    """
    described = {
        **about,
        _IMAGES: str(len(rows.keys)),
        _BAD: json.dumps([one._asdict() for one in bad]),
    }
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("class_name", pa.string()),
        pa.field(
            "feature",
            pa.list_(pa.from_numpy_dtype(rows.features.dtype), rows.features.shape[1]),
            nullable=False,
        ),
    ]
    absent = rows.labels < 0
    names = [
        classes[label] if 0 <= label < len(classes) else None for label in rows.labels.tolist()
    ]
    columns = [
        pa.array(rows.keys, pa.string()),
        pa.array([rows.split] * len(rows.keys), pa.string()),
        pa.array(rows.labels, mask=absent),
        pa.array(names, pa.string()),
        pa.FixedSizeListArray.from_arrays(
            pa.array(rows.features.reshape(-1)), rows.features.shape[1]
        ),
    ]
    schema = pa.schema(fields, {_PREFIX + name: value for name, value in described.items()})
    buffer = io.BytesIO()
    # no dictionary of features: hardly two are equal
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema),
        buffer,
        compression="zstd",
        use_dictionary=["split", "class_name"],
    )
    return buffer.getvalue()


def read_files(url: str, names: Sequence[str]) -> list[FeatureFile]:
    """What the metadata of some files in a folder says; their rows are not read.

    Raises:
        UsageError: one is no Parquet file with features of hemoco.
        StorageError: the storage refuses or does not answer.
    """
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        return list(threads.map(lambda name: _read_footer(join_url(url, name)), names))


def parse_file(url: str, metadata: Mapping[bytes, bytes] | None) -> FeatureFile:
    """What the metadata of a schema says.

    Args:
        url: of the file, for messages.
        metadata: of its schema.

    Raises:
        UsageError: it is not that of features of hemoco.
    """
    named = {
        name.decode(): value.decode()
        for name, value in (metadata or {}).items()
        if name.startswith(b"hemoco.")
    }
    found = {name.removeprefix(_PREFIX): value for name, value in named.items()}
    if found.get("format") != FORMAT:
        raise UsageError(
            f"{url}: holds no features of hemoco (format {found.get('format')}, this version reads {FORMAT}); "
            "remove it or name another folder"
        )
    bad = tuple(BadSample(**one) for one in json.loads(found.pop(_BAD)))
    return FeatureFile(found, int(found.pop(_IMAGES)), bad)


def not_parquet(url: str, error: Exception) -> UsageError:
    """For a file that cannot be read."""
    return UsageError(
        f"{url}: is no whole Parquet file ({error}); remove it, `python -m jobs embed` makes it again"
    )


def _read_footer(url: str) -> FeatureFile:
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
    """The last bytes of an object, at most so many."""
    with storage_errors(url):
        made, path = filesystem(url)
        return bytes(made.cat_file(path, start=-size))
