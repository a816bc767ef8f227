"""Lists the images of folders and archives in any supported layout as one source.

The layouts are class folders, flat folders, COCO and Pascal VOC. Folders `train/`, `val/` and
`test/` at the top of a source are its splits. Below them, or at the top if there are none, a folder
is a class. Images are only listed here; `read_items` reads them, in any process.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hemoco.data.shards.tar import IMAGE_SUFFIXES
from hemoco.data.sources.coco import scan_coco
from hemoco.data.sources.files import Location, list_files, read_files
from hemoco.data.sources.scan import (
    CLASSES,
    FLAT,
    Scan,
    SourceImage,
    check_split_name,
    suffix_of,
)
from hemoco.data.sources.voc import is_voc, scan_voc
from hemoco.errors import UsageError

logger = logging.getLogger(__name__)

_SPLITS = {"train", "val", "test"}


@dataclass(frozen=True)
class Item:
    """One image of a source, not yet read, so that it is small to send to another process."""

    key: str
    """Unique in the source; without dots and slashes."""
    split: str
    suffix: str
    location: Location
    label: int | None = None
    """Index into the classes of the source."""
    annotations: list[dict[str, Any]] | None = None
    """COCO annotations, unchanged."""
    image_id: int | None = None
    """COCO id of the image."""


@dataclass(frozen=True)
class Source:
    """The images of one or more folders or archives."""

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    """Sorted; empty when unlabelled."""
    categories: tuple[dict[str, Any], ...]
    """COCO categories by ascending id."""


def open_source(paths: Sequence[str], default_split: str) -> Source:
    """Lists the images of folders and archives as one source, whose classes are those of all.

    Args:
        paths: local folders, zip or tar archives.
        default_split: split of images outside of folders `train/`, `val/` and `test/`.

    Raises:
        UsageError: a path is missing or holds no images, or paths contradict each other.
        ShardError: an archive or an annotation file is damaged.
    """
    check_split_name(default_split)
    scans = _scan(paths, default_split)
    images = [image for scan in scans for image in scan.images]
    if not images:
        raise UsageError(f"{', '.join(paths)}: the COCO files list no images")
    _check_kinds(images)
    _check_image_ids(images)
    classes = _classes(images)
    labels: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    items = []
    for key, image in zip(_unique_keys(images), images, strict=True):
        item = Item(
            key=key,
            split=image.split,
            suffix=suffix_of(image.name),
            location=image.location,
            label=labels.get(image.class_name),
            annotations=image.annotations,
            image_id=image.image_id,
        )
        items.append(item)
    return Source(tuple(items), classes, _unite_categories(scans))


def read_items(items: Sequence[Item]) -> list[bytes]:
    """Reads the encoded images, in the order of the items.

    Raises:
        ShardError: a file is gone or its archive is damaged; the message names it.
    """
    return read_files([item.location for item in items])


class _Listing(NamedTuple):
    path: str
    files: dict[str, Location]
    images: dict[str, Location]


def _list_source(path: str) -> _Listing:
    files = _without_wrapper(list_files(path))
    images = {
        name: location for name, location in files.items() if suffix_of(name) in IMAGE_SUFFIXES
    }
    if not images:
        raise UsageError(
            f"{path}: no images ({', '.join(IMAGE_SUFFIXES)}); found {_describe(files)}"
        )
    if any(suffix_of(name) == "cls" for name in files):
        logger.warning("%s holds samples of webdataset; only --index_only reads their labels", path)
    return _Listing(path, files, images)


def _scan(paths: Sequence[str], default_split: str) -> list[Scan]:
    scans = []
    voc = []
    for path in paths:
        listing = _list_source(path)
        if is_voc(listing.files):
            voc.append(listing.files)
            continue
        scan = scan_coco(listing.files, listing.images, default_split)
        if scan is None:
            _warn_of_other_files(path, listing.files.keys() - listing.images.keys())
            scan = Scan(_scan_folders(path, listing.images, default_split), [])
        scans.append(scan)
    if voc:  # all VOC folders at once: their categories are numbered together, by name
        scans.append(scan_voc(voc, default_split))
    return scans


def _warn_of_other_files(path: str, names: Iterable[str]) -> None:
    """Logs the files that are left out: they may be images in a format that is not read."""
    counts = Counter(suffix_of(name) for name in names)
    if counts:
        described = ", ".join(f"{count} .{suffix}" for suffix, count in counts.most_common(8))
        suffixes = "/".join(IMAGE_SUFFIXES)
        logger.warning(
            "files left out, because they are none of %s: %s in %s", suffixes, described, path
        )


def _scan_folders(path: str, images: dict[str, Location], default_split: str) -> list[SourceImage]:
    tops = {name.partition("/")[0] if "/" in name else "" for name in images}
    splits, others = tops & _SPLITS, tops - _SPLITS
    if splits and others:
        folders = ", ".join(sorted(f"folder {top}" for top in others if top))
        raise UsageError(
            f"{path}: {', '.join(sorted(splits))} are splits, but there are also "
            f"{folders or 'images beside them'}; keep only train, val and test"
        )
    scanned = []
    for name, location in images.items():
        split, inner = default_split, name
        if splits:
            split, inner = name.split("/", 1)
        class_name, separator, _ = inner.partition("/")
        if separator:
            scanned.append(SourceImage(name, split, CLASSES, location, class_name))
        else:
            scanned.append(SourceImage(name, split, FLAT, location))
    return scanned


def _without_wrapper(files: dict[str, Location]) -> dict[str, Location]:
    """The files without a top folder that only contains the others, as archives often have."""
    tops = {name.partition("/")[0] for name in files}
    shallow = any(name.count("/") < 2 for name in files if suffix_of(name) in IMAGE_SUFFIXES)
    if len(tops) != 1 or shallow or tops & _SPLITS:
        return files
    return {name.partition("/")[2]: location for name, location in files.items()}


def _check_kinds(images: list[SourceImage]) -> None:
    """Raises UsageError if a split has both labelled and unlabelled, or annotated, images."""
    for split in sorted({image.split for image in images}):
        first_of_kind: dict[str, Location] = {}
        for image in images:
            if image.split == split:
                first_of_kind.setdefault(image.kind, image.location)
        if len(first_of_kind) > 1:
            kinds = sorted(first_of_kind)
            described = " and ".join(f"{kind} ({first_of_kind[kind]})" for kind in kinds)
            raise UsageError(
                f"split {split} would mix {described}; pack them apart or give them folders train, "
                "val, test"
            )


def _check_image_ids(images: list[SourceImage]) -> None:
    """Raises UsageError if two images of a split have the same COCO id.

    Detections are evaluated by image id, so results of the two could not be told apart.
    """
    ids = [(image.split, image.image_id) for image in images if image.image_id is not None]
    twice = [key for key, count in Counter(ids).items() if count > 1]
    if twice:
        split, image_id = twice[0]
        raise UsageError(
            f"split {split}: {len(twice)} COCO image ids occur twice, first {image_id}"
        )


def _classes(images: list[SourceImage]) -> tuple[str, ...]:
    names = sorted({image.class_name for image in images if image.class_name is not None})
    if len(names) == 1:
        logger.warning(
            "packed without labels: all images are in one folder, %r, which is no class", names[0]
        )
        return ()
    return tuple(names)


def _unite_categories(scans: list[Scan]) -> tuple[dict[str, Any], ...]:
    united: dict[int, dict[str, Any]] = {}
    for scan in scans:
        for category in scan.categories:
            known = united.setdefault(category["id"], category)
            if known.get("name") != category.get("name"):
                names = f"{known.get('name')!r} and {category.get('name')!r}"
                raise UsageError(
                    f"category {category['id']} is both {names}; pack these COCO files apart"
                )
    return tuple(united[number] for number in sorted(united))


def _unique_keys(images: list[SourceImage]) -> list[str]:
    """A key for each image: its name without suffix; repeated names get `-2`, `-3` and so on."""
    taken: set[str] = set()
    keys = []
    for image in images:
        base = re.sub(r"[./]", "_", image.name.rpartition(".")[0])
        # names on disk that are not UTF-8 could not be written to a log or a table
        base = base.encode("utf-8", "replace").decode()
        key, count = base, 1
        while key in taken:
            count += 1
            key = f"{base}-{count}"
        taken.add(key)
        keys.append(key)
    return keys


def _describe(files: dict[str, Location]) -> str:
    """The five most frequent suffixes with their counts; files without suffix last among equals."""
    counts = Counter(suffix_of(name) for name in files)
    by_count = sorted(counts, key=lambda suffix: (-counts[suffix], suffix == "", suffix))
    described = []
    for suffix in by_count[:5]:
        kind = f".{suffix}" if suffix else "without suffix"
        described.append(f"{counts[suffix]} {kind}")
    return ", ".join(described) or "nothing"
