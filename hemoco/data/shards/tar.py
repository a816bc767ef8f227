"""Samples in tar files by webdataset's conventions: written with webdataset, read without losses.

A sample consists of the members with the same key. The key is the path up to the first dot of the
file name; what follows that dot is the suffix. A file name that begins with a dot has no key here
(in webdataset, all hidden files of a folder form one sample).

webdataset's own reader loses data silently. It stops without an error at a damaged header, or where
the file was cut between two members; it joins the end of one tar with the start of the next; and it
yields parts of a sample whose members are not neighbours. So tars are read differently here: one
that does not end as tars end is an error, and members are grouped over the whole file.

Shapes: M samples of a shard.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hemoco.data.shards.table import SampleTable, crc32c
from hemoco.errors import ShardError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_NAME = re.compile(r"((?:[^\0]*/|)[^./\0]+)[.]([^/\0]*)")  # key and suffix
_METADATA = re.compile(r"__[^/]*__(/|$)")  # names that webdataset skips
# Longer numbers are ids of something else: the index has a name for every class up to the largest.
_CLASS = re.compile(rb"\s*0*(\d{1,6})\s*")
# tarfile does not turn every error into its own: damaged sizes, sparse maps and endless chains of
# extended headers raise the others (test_damage_of_any_kind_is_an_error_of_ours_or_none).
_DAMAGE = (tarfile.TarError, OSError, ValueError, LookupError, ArithmeticError, RecursionError)
_TAR_BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """One image as it was given, with its label and annotations."""

    key: str
    """Unique in its shard; in shards packed here, without dots and slashes."""
    image: bytes
    """The encoded image, unchanged."""
    label: int | None = None
    """Index into the classes of the shard index."""
    annotations: list[dict[str, Any]] | None = None
    """COCO annotations; an empty list is an image without objects, None an unannotated image."""
    image_id: int | None = None
    """The image's COCO id."""
    suffix: str = "jpg"
    """One of `IMAGE_SUFFIXES`."""


class SkippedMember(NamedTuple):
    """A member of a tar that belongs to no sample, with the reason."""

    name: str
    reason: str


class TarContent(NamedTuple):
    """All samples of a tar file in the order of their images, and the members without a sample."""

    samples: list[Sample]
    table: SampleTable
    skipped: list[SkippedMember]


def encode_shard(samples: Iterable[Sample]) -> bytes:
    """The samples as a tar file; equal samples give equal bytes.

    Raises:
        ShardError: a key or suffix that readers would split at another dot or slash.
    """
    import webdataset

    buffer = io.BytesIO()
    # PAX takes keys of any length; USTAR refuses names over 100 characters
    with webdataset.TarWriter(
        buffer, user="", group="", encoder=False, mtime=0, format="PAX_FORMAT"
    ) as writer:
        for sample in samples:
            writer.write(_webdataset_members(sample))
    return buffer.getvalue()


def parse_tar(data: bytes, name: str) -> TarContent:
    """Parses the tar file of any webdataset.

    A sample needs exactly one image: the one member with a plain image suffix, or else the one
    whose suffix ends in an image suffix (`left.jpg`). `cls` gives the label if it is a number;
    `json` gives annotations if it holds COCO's. Nothing is unpickled.

    Args:
        data: the whole file.
        name: name of the file, for errors.

    Raises:
        ShardError: it is not a tar, damaged, or cut; the message names the byte.
    """
    groups, skipped = _group(_members(data, name))
    by_offset: list[tuple[int, Sample]] = []
    for key, members in groups.items():
        image_suffix = _image_suffix(members)
        if image_suffix is None:
            skipped.append(_without_image(key, members))
            continue
        sample, skipped_of_sample = _sample(key, image_suffix, members, data)
        skipped += skipped_of_sample
        by_offset.append((members[image_suffix].offset, sample))
    by_offset.sort(key=lambda pair: pair[0])
    samples = [sample for _, sample in by_offset]
    labels = [-1 if sample.label is None else sample.label for sample in samples]
    suffixes = [IMAGE_SUFFIXES.index(sample.suffix) for sample in samples]
    table = SampleTable(
        keys=[sample.key for sample in samples],
        offsets=np.array([offset for offset, _ in by_offset], np.int64),
        sizes=np.array([len(sample.image) for sample in samples], np.int64),
        crcs=np.array([crc32c(sample.image) for sample in samples], np.uint32),
        labels=np.array(labels, np.int64),
        suffixes=np.array(suffixes, np.uint8),
    )
    return TarContent(samples, table, skipped)


class _Member(NamedTuple):
    name: str
    key: str
    suffix: str
    offset: int
    """First byte of its content in the tar."""
    size: int


_Groups = dict[str, dict[str, _Member]]
"""Members by key and suffix."""


def _webdataset_members(sample: Sample) -> dict[str, str | bytes]:
    if not sample.key or "." in sample.key or "/" in sample.key:
        raise ShardError(f"sample key {sample.key!r}: it must hold neither dots nor slashes")
    if sample.suffix not in IMAGE_SUFFIXES:
        raise ShardError(
            f"sample {sample.key}: suffix {sample.suffix!r} is none of {', '.join(IMAGE_SUFFIXES)}"
        )
    members: dict[str, str | bytes] = {"__key__": sample.key, sample.suffix: sample.image}
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    if sample.annotations is not None:
        described = {"image_id": sample.image_id, "annotations": sample.annotations}
        members["json"] = json.dumps(described, sort_keys=True).encode()
    return members


def _members(data: bytes, name: str) -> Iterator[_Member | SkippedMember]:
    """All members of a tar except folders.

    Raises:
        ShardError: the file is damaged, or does not end as a tar.
    """
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                # a negative size would lead back to members already read, in an endless loop
                if member.size < 0 or tar.offset <= end:
                    raise tarfile.ReadError(f"{member.name!r} has a size below 0")
                if tar.offset > len(data):
                    raise ShardError(
                        f"{name}: cut inside {member.name!r} at byte {len(data)}; "
                        "fetch or pack it again"
                    )
                end = tar.offset
                if not member.isdir():
                    yield _parse_name(member)
    except _DAMAGE as error:
        kind = "not a tar file, or damaged" if end == 0 else "damaged"
        raise ShardError(
            f"{name}: {kind} at byte {end} ({error}); fetch or pack it again"
        ) from error
    # tarfile, and so webdataset, takes a bad header or the end of the file for the end of the tar.
    # A whole tar ends in at least one block of zeros.
    tail = data[end:]
    if len(tail) < _TAR_BLOCK:
        raise ShardError(
            f"{name}: cut at byte {len(data)}, where a member or the end should follow; "
            "fetch or pack it again"
        )
    if tail.strip(b"\0"):
        raise ShardError(
            f"{name}: damaged at byte {end}, where a member should begin; fetch or pack it again"
        )


def _parse_name(member: tarfile.TarInfo) -> _Member | SkippedMember:
    if not member.isreg() or member.issparse():
        return SkippedMember(member.name, "not a regular file")
    if _METADATA.match(member.name):
        return SkippedMember(member.name, "metadata of webdataset")
    parsed = _NAME.fullmatch(member.name)
    if parsed is None:
        return SkippedMember(member.name, "a name without key and suffix")
    key, suffix = parsed.groups()
    return _Member(member.name, key, suffix.lower(), member.offset_data, member.size)


def _group(members: Iterable[_Member | SkippedMember]) -> tuple[_Groups, list[SkippedMember]]:
    groups: _Groups = {}
    skipped: list[SkippedMember] = []
    for member in members:
        if isinstance(member, SkippedMember):
            skipped.append(member)
            continue
        group = groups.setdefault(member.key, {})
        if member.suffix in group:
            skipped.append(SkippedMember(member.name, "a second member of that name"))
        else:
            group[member.suffix] = member
    return groups, skipped


def _image_suffix(members: dict[str, _Member]) -> str | None:
    """The suffix of a sample's one image; None if there is none, or several of equal rank."""
    plain = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    candidates = plain or _all_image_suffixes(members)
    return candidates[0] if len(candidates) == 1 else None


def _all_image_suffixes(members: dict[str, _Member]) -> list[str]:
    return [suffix for suffix in members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]


def _without_image(key: str, members: dict[str, _Member]) -> SkippedMember:
    images = _all_image_suffixes(members)
    if images:
        name = f"{key} (.{', .'.join(images[:3])})"
        return SkippedMember(name, "several images under one key")
    return SkippedMember(next(iter(members.values())).name, "a key without an image")


def _sample(
    key: str, image_suffix: str, members: dict[str, _Member], data: bytes
) -> tuple[Sample, list[SkippedMember]]:
    """A sample from its members, and those of them that could not be used."""

    def content(suffix: str) -> bytes:
        member = members[suffix]
        return data[member.offset : member.offset + member.size]

    skipped = []
    for suffix in _all_image_suffixes(members):
        if suffix != image_suffix:
            skipped.append(SkippedMember(members[suffix].name, "a further image under a key"))
    label = None
    if "cls" in members:
        number = _CLASS.fullmatch(content("cls"))
        if number is None:
            reason = "a class that is no number from 0 to 999999"
            skipped.append(SkippedMember(members["cls"].name, reason))
        else:
            label = int(number[1])
    described: Any = None
    if "json" in members:
        try:
            described = json.loads(content("json"))
        except (ValueError, RecursionError):
            skipped.append(SkippedMember(members["json"].name, "not JSON"))
    annotations, image_id = _coco(described)
    sample = Sample(
        key=key,
        image=content(image_suffix),
        label=label,
        annotations=annotations,
        image_id=image_id,
        suffix=image_suffix.rpartition(".")[2],
    )
    return sample, skipped


def _coco(described: Any) -> tuple[list[dict[str, Any]] | None, int | None]:
    """COCO annotations and image id of a JSON value; None for what other data sets store there."""
    annotations = described.get("annotations") if isinstance(described, dict) else None
    if not isinstance(annotations, list):
        return None, None
    if not all(isinstance(annotation, dict) for annotation in annotations):
        return None, None
    image_id = described.get("image_id")
    return annotations, image_id if type(image_id) is int else None
