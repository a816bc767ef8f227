"""The index of a shard folder, and reading and writing what it names.

A shard folder holds:

- `<split>-000000.tar` and so on: the shards. A sample is the members `<key>.<image suffix>`,
  `<key>.cls` (a class index in ASCII, if labelled) and `<key>.json`
  (`{"image_id": ..., "annotations": [...]}`, if it came from COCO), so any webdataset reader can
  read it.
- `samples/<sha256>.safetensors`: for each shard the table of its samples, with the bytes at which
  its images lie.
- `index.json`: the shards with their sizes and checksums. It is written last; a folder without it
  is not a shard folder.

An index may also name tars that others wrote, by their absolute URLs.

A shard is identified by size and SHA-256, never by its ETag: some servers return the ETag of
another version.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np

from hemoco.data.shards.table import SampleTable, decode_table, encode_table
from hemoco.data.shards.tar import Sample, parse_tar
from hemoco.errors import ShardError, StorageError
from hemoco.storage import objects as storage
from hemoco.storage.fetch import FetchCounts, verified_shard
from hemoco.storage.retry import patiently

INDEX_NAME = "index.json"
INDEX_FORMAT = "hemoco-shards"
INDEX_VERSION = 2
_TABLES_AT_ONCE = 16
UNFINISHED = "unfinished"
"""Folder below the shard folder while it is being packed."""


@dataclass(frozen=True)
class Shard:
    """One tar file, as the index describes it."""

    name: str
    """File name in the folder, or the absolute URL of a tar that others wrote."""
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a folder, and the meaning of their labels."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    """Names of the labels; empty when unlabelled."""
    categories: tuple[dict[str, Any], ...]
    """COCO categories; empty when there are no annotations."""
    packed: bool = True
    """True if hemoco wrote the tars and so may replace them; False if it only indexed them."""

    @property
    def digest(self) -> str:
        """Identity of the data: SHA-256 of everything in the index, hexadecimal."""
        # vars() and not asdict(), which takes most of a second for 100,000 shards
        fields = vars(self) | {"shards": [vars(shard) for shard in self.shards]}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in alphabetical order."""
        return tuple(sorted({shard.split for shard in self.shards}))

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of one split, or of several joined by `+` (`train+val`), in index order.

        Raises:
            ShardError: there is no such split.
        """
        names = name.split("+")
        missing = [each for each in names if each not in self.splits]
        if missing:
            known = ", ".join(self.splits) or "no splits"
            raise ShardError(
                f"no split {missing[0]!r} among the shards; they have {known}: name one as "
                "data.pretrain_split, data.train_split or data.test_split"
            )
        return tuple(shard for shard in self.shards if shard.split in names)


class ShardColumns:
    """Shards as arrays of some 100 bytes for each, indexed by shard number.

    Every loader process holds all shards of a split; as objects they would take several times more.

    Attributes:
        samples: int64 (shards,).
        bytes: int64 (shards,).
    """

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self._names = np.array([shard.name.encode() for shard in shards])
        self._splits = sorted({shard.split for shard in shards})
        self._split = np.array([self._splits.index(shard.split) for shard in shards], np.uint8)
        self._sha256 = np.frombuffer(
            bytes.fromhex("".join(shard.sha256 for shard in shards)), "V32"
        )
        self.samples = np.array([shard.samples for shard in shards], np.int64)
        self.bytes = np.array([shard.bytes for shard in shards], np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> Shard:
        return Shard(
            name=self._names[number].decode(),
            split=self._splits[self._split[number]],
            samples=int(self.samples[number]),
            bytes=int(self.bytes[number]),
            sha256=self._sha256[number].tobytes().hex(),
        )


def write_index(url: str, index: ShardIndex) -> None:
    """Writes `index.json` into the folder at a URL, which makes it a shard folder."""
    fields = {
        "format": INDEX_FORMAT,
        "version": INDEX_VERSION,
        "digest": index.digest,
        **asdict(index),
    }
    storage.write_bytes(storage.join_url(url, INDEX_NAME), json.dumps(fields, indent=1).encode())


def read_index(url: str, *, patience_s: float = 0.0) -> ShardIndex:
    """Reads and checks the index of a shard folder.

    Args:
        url: URL of the shard folder.
        patience_s: seconds for which faults of the network are retried. None at the start of a
            command, where a wrong URL is the likely cause.

    Raises:
        ShardError: it is missing, damaged, or of another format or version.
        StorageError: the storage refuses or does not answer.
    """
    index_url = storage.join_url(url, INDEX_NAME)
    try:
        data = patiently(lambda: storage.read_bytes(index_url), patience_s)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        # list_names raises if it is the bucket that is missing: that message is the better one
        if storage.list_names(storage.join_url(url, UNFINISHED)):
            raise ShardError(
                f"{url}: an unfinished pack; run the same `python -m jobs pack SOURCE DEST` again "
                "to finish it"
            ) from error
        raise ShardError(
            f"{url}: no {INDEX_NAME}, so no shards here; make some with "
            "`python -m jobs pack SOURCE DEST`"
        ) from error
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise ShardError(f"{index_url}: not JSON ({error}); pack the data again") from error
    if not isinstance(fields, dict) or fields.get("format") != INDEX_FORMAT:
        raise ShardError(
            f"{index_url}: not an index of format {INDEX_FORMAT!r}; is this a shard folder of "
            "hemoco?"
        )
    if fields.get("version") != INDEX_VERSION:
        version = fields.get("version")
        raise ShardError(
            f"{index_url}: index version {version}, this hemoco reads {INDEX_VERSION}; "
            "pack the data again"
        )
    try:
        index = ShardIndex(
            shards=tuple(Shard(**shard) for shard in fields["shards"]),
            classes=tuple(fields["classes"]),
            categories=tuple(fields["categories"]),
            packed=bool(fields["packed"]),
        )
    except (KeyError, TypeError) as error:
        raise ShardError(f"{index_url}: damaged index ({error}); pack the data again") from error
    if index.digest != fields.get("digest"):
        raise ShardError(
            f"{index_url}: its digest does not match its content: it was edited; "
            "pack the data again"
        )
    return index


class ShardIndexes:
    """Indexes of shard folders by URL, each read once, when it is first needed.

    A command creates one and passes it on: its checks, pretraining and transfers then see the same
    index, and its driver reads it once. Worker processes read the index themselves, once each.
    """

    def __init__(self) -> None:
        self._indexes: dict[str, ShardIndex] = {}
        self._lock = Lock()  # transfers run in threads

    def at(self, url: str) -> ShardIndex:
        """The index of the folder at a URL.

        Raises:
            ShardError, StorageError: see `read_index`; the next call tries again.
        """
        with self._lock:
            if url not in self._indexes:
                self._indexes[url] = read_index(url)
            return self._indexes[url]


def shard_url(url: str, shard: Shard) -> str:
    """The URL of a shard of the folder at `url`."""
    return shard.name if "://" in shard.name else storage.join_url(url, shard.name)


def read_shard(url: str, shard: Shard) -> list[Sample]:
    """Fetches, verifies and parses a shard of the folder at a URL.

    Returns:
        Its samples in the order of its table.

    Raises:
        ShardError: size, checksum or number of samples differ from the index.
        StorageError: it is missing, or the storage refuses or does not answer.
    """
    tar_url = shard_url(url, shard)
    data = bytes(verified_shard(tar_url, shard.bytes, shard.sha256, FetchCounts()))
    samples = parse_tar(data, tar_url).samples
    if len(samples) != shard.samples:
        raise ShardError(
            f"{tar_url}: {len(samples)} samples, the index says {shard.samples}; "
            "pack the data again"
        )
    return samples


def check_shard(tar_url: str, shard: Shard, data: bytes) -> None:
    """Compares the bytes of a shard with its entry in the index.

    Raises:
        ShardError: size or checksum differ.
    """
    if len(data) != shard.bytes:
        raise ShardError(
            f"{tar_url}: {len(data)} bytes, the index says {shard.bytes}; pack the data again"
        )
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise ShardError(
            f"{tar_url}: checksum differs from the index: it is damaged or was replaced; "
            "pack it again"
        )


def write_table(url: str, shard: Shard, table: SampleTable) -> None:
    """Writes the table of a shard into the shard folder at a URL."""
    storage.write_bytes(_table_url(url, shard), encode_table(table))


def read_table(url: str, shard: Shard) -> SampleTable:
    """The table of a shard of the folder at a URL.

    Raises:
        ShardError: it is missing, damaged, or of another number of samples.
        StorageError: the storage refuses or does not answer.
    """
    table_url = _table_url(url, shard)
    try:
        table = decode_table(storage.read_bytes(table_url))
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise ShardError(
            f"{table_url}: the sample table of {shard.name} is missing; pack the data again"
        ) from error
    except ValueError as error:
        raise ShardError(
            f"{table_url}: the sample table of {shard.name} is damaged ({error}); "
            "pack the data again"
        ) from error
    if len(table.keys) != shard.samples:
        raise ShardError(
            f"{table_url}: {len(table.keys)} samples in the table of {shard.name}, the index says "
            f"{shard.samples}; pack the data again"
        )
    return table


def read_tables(url: str, shards: Iterable[Shard]) -> Iterator[SampleTable]:
    """The tables of several shards in their order, read in parallel.

    Raises:
        ShardError, StorageError: see `read_table`.
    """
    with ThreadPoolExecutor(_TABLES_AT_ONCE) as threads:
        yield from threads.map(partial(read_table, url), shards)


def check_table(url: str, shard: Shard, table: SampleTable) -> None:
    """Compares the stored table of a shard with the one made of the shard's content.

    Raises:
        ShardError: the stored table is missing, damaged, or differs.
        StorageError: the storage refuses or does not answer.
    """
    stored, made = read_table(url, shard)._asdict(), table._asdict()
    equal = stored.pop("keys") == made.pop("keys")
    if not equal or not all(np.array_equal(stored[name], made[name]) for name in made):
        raise ShardError(
            f"{_table_url(url, shard)}: the sample table of {shard.name} does not match its "
            "content; pack the data again"
        )


def remove_table(url: str, shard: Shard) -> None:
    """Removes the table of a shard."""
    storage.remove(_table_url(url, shard))


def _table_url(url: str, shard: Shard) -> str:
    # named by the shard's content, so that no shard gets the table of the one that it replaced
    return storage.join_url(url, "samples", f"{shard.sha256}.safetensors")
