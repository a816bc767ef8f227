"""Shards: tar files of samples, and the index that says what is in them.

A shard folder holds `<split>-000000.tar` and so on, for each of them a table `samples/<sha256>.safetensors` that says
where its images lie, and `index.json`, which is written last: a folder without it is not a shard folder. A sample is
the members `<key>.<image suffix>`, `<key>.cls` (a class index in ASCII, when labelled) and `<key>.json` (`{"image_id":
..., "annotations": [...]}`, when it came from COCO), so any webdataset reader can read it. An index may also name tars
that others wrote, by their absolute URLs.

A shard is told by size and SHA-256, never by its ETag, which some servers give from another version.
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
    """What the index says about one tar file."""

    name: str
    """Below the folder, or the absolute URL of somebody else's tar."""
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a folder, and what their labels mean."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    """Names of the labels; empty when unlabelled."""
    categories: tuple[dict[str, Any], ...]
    """COCO categories; empty when there are no annotations."""
    packed: bool = True
    """Whether hemoco wrote the tars, and so may replace them; False where it only made the index of others' tars."""

    @property
    def digest(self) -> str:
        """Identifies the data: SHA-256 of everything in the index, hexadecimal."""
        # vars: asdict takes most of a second for 100,000 shards
        fields = vars(self) | {"shards": [vars(shard) for shard in self.shards]}
        return hashlib.sha256(
            json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

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
        if missing := [each for each in names if each not in self.splits]:
            known = ", ".join(self.splits) or "no splits"
            raise ShardError(
                f"no split {missing[0]!r} among the shards; they have {known}: name one as data.pretrain_split, "
                "data.train_split or data.test_split"
            )
        return tuple(shard for shard in self.shards if shard.split in names)


class ShardColumns:
    """Shards as arrays: some 100 bytes each, so that every loader process can hold those of the largest data set."""

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
    """Writes `index.json` below the shard folder's URL, which makes the folder readable."""
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
        url: of the folder.
        patience_s: seconds for which faults of the network are waited out; none at the start of a command, where the
            likely fault is a wrong URL.

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
        if storage.list_names(
            storage.join_url(url, UNFINISHED)
        ):  # raises where it is the bucket that is missing
            raise ShardError(
                f"{url}: an unfinished pack; the same `python -m jobs pack SOURCE DEST` again goes on"
            ) from error
        raise ShardError(
            f"{url}: no {INDEX_NAME}, so no shards here; make some with `python -m jobs pack SOURCE DEST`"
        ) from error
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise ShardError(f"{index_url}: not JSON ({error}); pack the data again") from error
    if not isinstance(fields, dict) or fields.get("format") != INDEX_FORMAT:
        raise ShardError(
            f"{index_url}: not an index of format {INDEX_FORMAT!r}; is this a shard folder of hemoco?"
        )
    if fields.get("version") != INDEX_VERSION:
        version = fields.get("version")
        raise ShardError(
            f"{index_url}: index version {version}, this hemoco reads {INDEX_VERSION}; pack the data again"
        )
    index = _parse_index(index_url, fields)
    if index.digest != fields.get("digest"):
        raise ShardError(
            f"{index_url}: its digest does not fit its content: it was edited; pack the data again"
        )
    return index


class ShardIndexes:
    """Indexes of shard folders by URL, each read once, when it is first needed.

    A command makes one and passes it on, so that its checks, its pretraining and its transfers see the same index and
    its driver reads it once. Worker processes read the index themselves, once each.
    """

    def __init__(self) -> None:
        self._indexes: dict[str, ShardIndex] = {}
        self._lock = Lock()  # transfers run in threads

    def at(self, url: str) -> ShardIndex:
        """The index of the folder at a URL.

        Raises:
            ShardError, StorageError: as `read_index`; the next call tries again.
        """
        with self._lock:
            if url not in self._indexes:
                self._indexes[url] = read_index(url)
            return self._indexes[url]


def shard_url(url: str, shard: Shard) -> str:
    """Where a shard of the folder at a URL lies."""
    return shard.name if "://" in shard.name else storage.join_url(url, shard.name)


def read_shard(url: str, shard: Shard) -> list[Sample]:
    """Fetches, verifies and parses one shard of the folder at a URL; its samples are in the order of its table.

    Raises:
        ShardError: size, checksum or number of samples differ from the index.
        StorageError: it is missing, or the storage refuses or does not answer.
    """
    where = shard_url(url, shard)
    data = bytes(verified_shard(where, shard.bytes, shard.sha256, FetchCounts()))
    samples = parse_tar(data, where).samples
    if len(samples) != shard.samples:
        raise ShardError(
            f"{where}: {len(samples)} samples, the index says {shard.samples}; pack the data again"
        )
    return samples


def check_shard(where: str, shard: Shard, data: bytes) -> None:
    """Compares a shard's bytes with the index.

    Raises:
        ShardError: size or checksum differ.
    """
    if len(data) != shard.bytes:
        raise ShardError(
            f"{where}: {len(data)} bytes, the index says {shard.bytes}; pack the data again"
        )
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise ShardError(
            f"{where}: checksum differs from the index: it is damaged or was replaced; pack it again"
        )


def write_table(url: str, shard: Shard, table: SampleTable) -> None:
    """Writes the table of a shard below the shard folder's URL."""
    storage.write_bytes(_table_url(url, shard), encode_table(table))


def read_table(url: str, shard: Shard) -> SampleTable:
    """The table of a shard.

    Raises:
        ShardError: it is missing, damaged, or of another number of samples.
        StorageError: the storage refuses or does not answer.
    """
    where = _table_url(url, shard)
    try:
        table = decode_table(storage.read_bytes(where))
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise ShardError(
            f"{where}: the sample table of {shard.name} is missing; pack the data again"
        ) from error
    except ValueError as error:
        raise ShardError(
            f"{where}: the sample table of {shard.name} is damaged ({error}); pack the data again"
        ) from error
    if len(table.keys) != shard.samples:
        raise ShardError(
            f"{where}: {len(table.keys)} samples in the table of {shard.name}, the index says {shard.samples}; "
            "pack the data again"
        )
    return table


def read_tables(url: str, shards: Iterable[Shard]) -> Iterator[SampleTable]:
    """The tables of several shards in their order, read side by side.

    Raises:
        ShardError, StorageError: as `read_table`.
    """
    with ThreadPoolExecutor(_TABLES_AT_ONCE) as threads:
        yield from threads.map(partial(read_table, url), shards)


def check_table(url: str, shard: Shard, table: SampleTable) -> None:
    """Compares the table of a shard, as it is stored, with the one that its content gives.

    Raises:
        ShardError: it is missing, damaged, or another.
        StorageError: the storage refuses or does not answer.
    """
    stored, made = read_table(url, shard)._asdict(), table._asdict()
    if stored.pop("keys") != made.pop("keys") or not all(
        np.array_equal(stored[name], made[name]) for name in made
    ):
        where = _table_url(url, shard)
        raise ShardError(
            f"{where}: the sample table of {shard.name} does not fit its content; pack the data again"
        )


def remove_table(url: str, shard: Shard) -> None:
    """Removes the table of a shard."""
    storage.remove(_table_url(url, shard))


def _table_url(url: str, shard: Shard) -> str:
    # by content: the table of a replaced shard cannot be taken for its own
    return storage.join_url(url, "samples", f"{shard.sha256}.safetensors")


def _parse_index(index_url: str, fields: dict[str, Any]) -> ShardIndex:
    try:
        return ShardIndex(
            shards=tuple(Shard(**shard) for shard in fields["shards"]),
            classes=tuple(fields["classes"]),
            categories=tuple(fields["categories"]),
            packed=bool(fields["packed"]),
        )
    except (KeyError, TypeError) as error:
        raise ShardError(f"{index_url}: damaged index ({error}); pack the data again") from error
