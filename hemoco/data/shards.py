"""Shards: tar files of samples, and the index that says what is in them.

A shard folder holds `<split>-000000.tar` and so on, and `index.json`, which is written last: a folder without it is not
a shard folder. A sample is the members `<key>.<image suffix>`, `<key>.cls` (a class index in ASCII, when labelled) and
`<key>.json` (`{"image_id": ..., "annotations": [...]}`, when it came from COCO), so any webdataset reader can read it.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hemoco import storage
from hemoco.errors import ShardError

INDEX_NAME = "index.json"
INDEX_FORMAT = "hemoco-shards"
INDEX_VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")


@dataclass(frozen=True)
class Sample:
    """One image as it was given, with what is known about it."""

    key: str
    """Unique in its shard folder; holds neither dots nor slashes."""
    image: bytes
    """The encoded image, unchanged."""
    label: int | None = None
    """Position in the index's classes."""
    annotations: list[dict[str, Any]] | None = None
    """COCO annotations; an empty list is an image without objects, None is an unannotated one."""
    image_id: int | None = None
    """The image's COCO id."""
    suffix: str = "jpg"
    """One of `IMAGE_SUFFIXES`."""


@dataclass(frozen=True)
class Shard:
    """What the index says about one tar file."""

    name: str
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

    @property
    def digest(self) -> str:
        """Identifies the data: SHA-256 of everything in the index, hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in alphabetical order."""
        return tuple(sorted({shard.split for shard in self.shards}))

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of one split, in index order.

        Raises:
            ShardError: there is no such split.
        """
        found = tuple(shard for shard in self.shards if shard.split == name)
        if not found:
            raise ShardError(f"no split {name!r} among the shards; they have {', '.join(self.splits) or 'no splits'}")
        return found


def write_index(url: str, index: ShardIndex) -> None:
    """Writes `index.json` below the shard folder's URL, which makes the folder readable."""
    fields = {"format": INDEX_FORMAT, "version": INDEX_VERSION, "digest": index.digest, **asdict(index)}
    storage.write_bytes(storage.join_url(url, INDEX_NAME), json.dumps(fields, indent=1).encode())


def read_index(url: str) -> ShardIndex:
    """Reads and checks the index of a shard folder.

    Raises:
        ShardError: it is missing, damaged, or of another format or version.
        StorageError: the storage refuses or does not answer.
    """
    index_url = storage.join_url(url, INDEX_NAME)
    if not storage.exists(index_url):
        raise ShardError(f"{url}: no {INDEX_NAME}, so no shards here; make some with `python -m jobs pack SOURCE DEST`")
    try:
        fields = json.loads(storage.read_bytes(index_url))
    except ValueError as error:
        raise ShardError(f"{index_url}: not JSON ({error}); pack the data again") from error
    if not isinstance(fields, dict) or fields.get("format") != INDEX_FORMAT:
        raise ShardError(f"{index_url}: not an index of format {INDEX_FORMAT!r}; is this a shard folder of hemoco?")
    if fields.get("version") != INDEX_VERSION:
        version = fields.get("version")
        raise ShardError(
            f"{index_url}: index version {version}, this hemoco reads {INDEX_VERSION}; pack the data again"
        )
    index = _parse_index(index_url, fields)
    if index.digest != fields.get("digest"):
        raise ShardError(f"{index_url}: its digest does not fit its content: it was edited; pack the data again")
    return index


def encode_shard(samples: Iterable[Sample]) -> bytes:
    """The samples as a tar file; the same samples give the same bytes.

    Raises:
        ShardError: a key or suffix that readers would split elsewhere.
    """
    import webdataset

    buffer = io.BytesIO()
    # PAX holds any key; USTAR refuses names over 100 characters
    with webdataset.TarWriter(buffer, user="", group="", encoder=False, mtime=0, format="PAX_FORMAT") as writer:
        for sample in samples:
            writer.write(_members(sample))
    return buffer.getvalue()


def read_shard(url: str, shard: Shard) -> list[Sample]:
    """Fetches, verifies and parses one shard of the folder at a URL; its samples are in stored order.

    Raises:
        ShardError: size, checksum or number of samples differ from the index, or a member is not one of ours.
        StorageError: it is missing, or the storage refuses or does not answer.
    """
    shard_url = storage.join_url(url, shard.name)
    data = storage.read_bytes(shard_url)
    if len(data) != shard.bytes:
        raise ShardError(f"{shard_url}: {len(data)} bytes, the index says {shard.bytes}; pack the data again")
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise ShardError(f"{shard_url}: checksum differs from the index: it is damaged; pack the data again")
    try:
        samples = list(_parse_samples(data))
    except (tarfile.TarError, ValueError) as error:
        raise ShardError(f"{shard_url}: not a shard of hemoco ({error}); pack the data again") from error
    if len(samples) != shard.samples:
        raise ShardError(f"{shard_url}: {len(samples)} samples, the index says {shard.samples}; pack the data again")
    return samples


def _parse_index(index_url: str, fields: dict[str, Any]) -> ShardIndex:
    try:
        return ShardIndex(
            shards=tuple(Shard(**shard) for shard in fields["shards"]),
            classes=tuple(fields["classes"]),
            categories=tuple(fields["categories"]),
        )
    except (KeyError, TypeError) as error:
        raise ShardError(f"{index_url}: damaged index ({error}); pack the data again") from error


def _members(sample: Sample) -> dict[str, str | bytes]:
    if not sample.key or "." in sample.key or "/" in sample.key:
        raise ShardError(f"sample key {sample.key!r}: it must hold neither dots nor slashes")
    if sample.suffix not in IMAGE_SUFFIXES:
        raise ShardError(f"sample {sample.key}: suffix {sample.suffix!r} is none of {', '.join(IMAGE_SUFFIXES)}")
    members: dict[str, str | bytes] = {"__key__": sample.key, sample.suffix: sample.image}
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    if sample.annotations is not None:
        described = {"image_id": sample.image_id, "annotations": sample.annotations}
        members["json"] = json.dumps(described, sort_keys=True).encode()
    return members


def _parse_samples(data: bytes) -> Iterator[Sample]:
    """Yields samples of a tar file; ValueError where a member is not one of ours."""
    grouped: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            key, dot, suffix = member.name.partition(".")
            content = tar.extractfile(member) if member.isfile() else None
            if content is None or not dot or suffix not in (*IMAGE_SUFFIXES, "cls", "json"):
                raise ValueError(f"unexpected member {member.name!r}")
            grouped.setdefault(key, {})[suffix] = content.read()
    for key, members in grouped.items():
        yield _parse_sample(key, members)


def _parse_sample(key: str, members: dict[str, bytes]) -> Sample:
    images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise ValueError(f"sample {key} has {len(images)} images")
    described = json.loads(members["json"]) if "json" in members else {}
    if not isinstance(described, dict):
        raise ValueError(f"sample {key}: its annotations are not a JSON object")
    label = int(members["cls"]) if "cls" in members else None
    annotations, image_id = described.get("annotations"), described.get("image_id")
    return Sample(key, members[images[0]], label, annotations, image_id, images[0])
