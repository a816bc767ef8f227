"""Samples in a tar file by webdataset's conventions, written through that library and found without losing any.

A sample is the members of one key: the path up to the first dot of the file name; what follows the dot is the suffix.
A file name that begins with a dot has no key here (to webdataset all hidden files of a folder are one sample).
webdataset itself ends in silence where a header is damaged or the file was cut between two members, glues the end of
one tar to the start of the next, and gives back part of a sample whose members are not neighbours; here a tar that does
not end as tars end is an error, and members are grouped over the whole file.

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
_NAME = re.compile(r"((?:[^\0]*/|)[^./\0]+)[.]([^/\0]*)")
_METADATA = re.compile(r"__[^/]*__(/|$)")  # webdataset passes over it
_CLASS = re.compile(
    rb"\s*0*(\d{1,6})\s*"
)  # longer numbers are ids: an index could not hold a name for each below
# besides its own errors tarfile lets through what a damaged size, sparse map or chain of extended headers does to it
_DAMAGE = (tarfile.TarError, OSError, ValueError, LookupError, ArithmeticError, RecursionError)
_BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """One image as it was given, with what is known about it."""

    key: str
    """Unique in its shard; of shards packed here it holds neither dots nor slashes."""
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


class OddMember(NamedTuple):
    """What is in a tar but belongs to no sample, and why."""

    name: str
    reason: str


class TarContent(NamedTuple):
    """All samples of a tar file in the order of their images, and what is none."""

    samples: list[Sample]
    table: SampleTable
    odd: list[OddMember]


def encode_shard(samples: Iterable[Sample]) -> bytes:
    """The samples as a tar file; the same samples give the same bytes.

    Raises:
        ShardError: a key or suffix that readers would split elsewhere.
    """
    import webdataset

    buffer = io.BytesIO()
    # PAX holds any key; USTAR refuses names over 100 characters
    with webdataset.TarWriter(
        buffer, user="", group="", encoder=False, mtime=0, format="PAX_FORMAT"
    ) as writer:
        for sample in samples:
            writer.write(_members_of(sample))
    return buffer.getvalue()


def parse_tar(data: bytes, name: str) -> TarContent:
    """Finds the samples of any webdataset's tar file.

    A sample needs exactly one image: the one member with a plain image suffix, else the one whose suffix ends in it.
    `cls` is the label where it is a number; `json` gives annotations where it holds COCO's. Nothing is unpickled.

    Args:
        data: the whole file.
        name: for errors.

    Raises:
        ShardError: it is not a tar, damaged, or cut; says at which byte.
    """
    groups, odd = _group(_walk(data, name))
    samples, offsets, crcs = [], [], []
    for key, members in groups.items():
        image = _image_suffix(members)
        if image is None:
            odd.append(_without_image(key, members))
            continue
        sample, flaws = _sample(key, image, members, data)
        odd += flaws
        samples.append(sample)
        offsets.append(members[image].offset)
        crcs.append(crc32c(sample.image))
    order = np.argsort(offsets, kind="stable").tolist()
    samples = [samples[i] for i in order]
    table = SampleTable(
        keys=[sample.key for sample in samples],
        offsets=np.array([offsets[i] for i in order], np.int64),
        sizes=np.array([len(sample.image) for sample in samples], np.int64),
        crcs=np.array([crcs[i] for i in order], np.uint32),
        labels=np.array(
            [-1 if sample.label is None else sample.label for sample in samples], np.int64
        ),
        suffixes=np.array([IMAGE_SUFFIXES.index(sample.suffix) for sample in samples], np.uint8),
    )
    return TarContent(samples, table, odd)


class _Member(NamedTuple):
    name: str
    key: str
    suffix: str
    offset: int
    size: int


_Groups = dict[str, dict[str, _Member]]


def _members_of(sample: Sample) -> dict[str, str | bytes]:
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


def _walk(data: bytes, name: str) -> Iterator[_Member | OddMember]:
    """All members but folders; ShardError where the file is damaged or does not end as a tar."""
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.size < 0 or tar.offset <= end:  # it would lead back, and round for ever
                    raise tarfile.ReadError(f"{member.name!r} has a size below 0")
                if tar.offset > len(data):
                    raise ShardError(
                        f"{name}: cut inside {member.name!r} at byte {len(data)}; fetch or pack it again"
                    )
                end = tar.offset
                if not member.isdir():
                    yield _named(member)
    except _DAMAGE as error:
        kind = "not a tar file, or damaged" if end == 0 else "damaged"
        raise ShardError(
            f"{name}: {kind} at byte {end} ({error}); fetch or pack it again"
        ) from error
    # tarfile, and webdataset with it, takes a bad header or the end of the file for the end of the tar
    tail = data[end:]
    if len(tail) < _BLOCK:
        raise ShardError(
            f"{name}: cut at byte {len(data)}, where a member or the end should follow; fetch or pack it again"
        )
    if tail.strip(b"\0"):
        raise ShardError(
            f"{name}: damaged at byte {end}, where a member should begin; fetch or pack it again"
        )


def _named(member: tarfile.TarInfo) -> _Member | OddMember:
    if not member.isreg() or member.issparse():
        return OddMember(member.name, "not a regular file")
    if _METADATA.match(member.name):
        return OddMember(member.name, "metadata of webdataset")
    found = _NAME.fullmatch(member.name)
    if found is None:
        return OddMember(member.name, "a name without key and suffix")
    key, suffix = found.groups()
    return _Member(member.name, key, suffix.lower(), member.offset_data, member.size)


def _group(found: Iterable[_Member | OddMember]) -> tuple[_Groups, list[OddMember]]:
    groups: _Groups = {}
    odd: list[OddMember] = []
    for member in found:
        if isinstance(member, OddMember):
            odd.append(member)
        elif member.suffix in groups.setdefault(member.key, {}):
            odd.append(OddMember(member.name, "a second member of that name"))
        else:
            groups[member.key][member.suffix] = member
    return groups, odd


def _image_suffix(members: dict[str, _Member]) -> str | None:
    """The suffix of the one image; None where there is none, or where it cannot be told which."""
    plain = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    candidates = plain or _images(members)
    return candidates[0] if len(candidates) == 1 else None


def _images(members: dict[str, _Member]) -> list[str]:
    return [suffix for suffix in members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]


def _without_image(key: str, members: dict[str, _Member]) -> OddMember:
    images = _images(members)
    if images:
        return OddMember(f"{key} (.{', .'.join(images[:3])})", "several images under one key")
    return OddMember(next(iter(members.values())).name, "a key without an image")


def _sample(
    key: str, image_suffix: str, members: dict[str, _Member], data: bytes
) -> tuple[Sample, list[OddMember]]:
    def content(suffix: str) -> bytes:
        member = members[suffix]
        return data[member.offset : member.offset + member.size]

    further = [suffix for suffix in _images(members) if suffix != image_suffix]
    flaws = [OddMember(members[suffix].name, "a further image under a key") for suffix in further]
    number = _CLASS.fullmatch(content("cls")) if "cls" in members else None
    if "cls" in members and number is None:
        flaws.append(OddMember(members["cls"].name, "a class that is no number from 0 to 999999"))
    described: Any = None
    if "json" in members:
        try:
            described = json.loads(content("json"))
        except (ValueError, RecursionError):
            flaws.append(OddMember(members["json"].name, "not JSON"))
    annotations, image_id = _coco(described)
    label = None if number is None else int(number[1])
    suffix = image_suffix.rpartition(".")[2]
    return Sample(key, content(image_suffix), label, annotations, image_id, suffix), flaws


def _coco(described: Any) -> tuple[list[dict[str, Any]] | None, int | None]:
    """Annotations and image id, where a JSON value holds them: others keep other things in theirs."""
    annotations = described.get("annotations") if isinstance(described, dict) else None
    if not isinstance(annotations, list) or not all(
        isinstance(annotation, dict) for annotation in annotations
    ):
        return None, None
    image_id = described.get("image_id")
    return annotations, image_id if type(image_id) is int else None
