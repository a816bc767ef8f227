"""Sources: what people have (class folders, flat folders, archives of them, COCO, Pascal VOC) as one list of images.

Folders `train/`, `val/`, `test/` at the top of a source are its splits; below them, or at the top when there are
none, a folder is a class. Only listings are made here; images are read by `read_items`, anywhere.
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
from hemoco.data.sources.found import CLASSES, FLAT, FoundImage, Scan, check_split_name, suffix_of
from hemoco.data.sources.voc import is_voc, scan_voc
from hemoco.errors import UsageError

logger = logging.getLogger(__name__)

_SPLITS = {"train", "val", "test"}


@dataclass(frozen=True)
class Item:
    """One image of a source, not yet read; pickles small."""

    key: str
    """Unique in the source; holds neither dots nor slashes."""
    split: str
    suffix: str
    location: Location
    label: int | None = None
    """Position in the source's classes."""
    annotations: list[dict[str, Any]] | None = None
    """COCO annotations, as they were."""
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
    """Lists the images of folders and archives as one source; their classes are united.

    Args:
        paths: local folders, zip or tar archives.
        default_split: split of images that no folder `train/`, `val/` or `test/` puts in one.

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
    labels = {name: label for label, name in enumerate(classes)}
    items = tuple(
        Item(
            key=key,
            split=image.split,
            suffix=suffix_of(image.name),
            location=image.location,
            label=labels.get(image.class_name) if image.class_name is not None else None,
            annotations=image.annotations,
            image_id=image.image_id,
        )
        for key, image in zip(_unique_keys(images), images, strict=True)
    )
    return Source(items, classes, _unite_categories(scans))


def read_items(items: Sequence[Item]) -> list[bytes]:
    """The encoded images, in the order of the items.

    Raises:
        ShardError: a file is gone or its archive is damaged; names it.
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
        logger.warning(
            "%s holds samples of webdataset, whose labels are not read so; see --index_only", path
        )
    return _Listing(path, files, images)


def _scan(paths: Sequence[str], default_split: str) -> list[Scan]:
    listings = [_list_source(path) for path in paths]
    voc = [listing.files for listing in listings if is_voc(listing.files)]
    scans = []
    for path, files, images in listings:
        if not is_voc(files):
            coco = scan_coco(files, images, default_split)
            if coco is None:
                _warn_of_others(path, files.keys() - images.keys())
            scans.append(coco or Scan(_folder_images(path, images, default_split), []))
    # together, for their categories are numbered by name
    return [*scans, scan_voc(voc, default_split)] if voc else scans


def _warn_of_others(path: str, names: Iterable[str]) -> None:
    """Says what is left out, for it may be images of a format that is not read."""
    counts = Counter(suffix_of(name) for name in names)
    if counts:
        described = ", ".join(f"{count} .{suffix}" for suffix, count in counts.most_common(8))
        logger.warning(
            "files left out, for they are none of %s: %s in %s",
            "/".join(IMAGE_SUFFIXES),
            described,
            path,
        )


def _folder_images(path: str, images: dict[str, Location], default_split: str) -> list[FoundImage]:
    tops = {name.partition("/")[0] if "/" in name else "" for name in images}
    if tops & _SPLITS and tops - _SPLITS:
        others = (
            ", ".join(sorted(top and f"folder {top}" for top in tops - _SPLITS))
            or "images beside them"
        )
        splits = ", ".join(sorted(tops & _SPLITS))
        raise UsageError(
            f"{path}: {splits} are splits, but there are also {others}; keep only train, val and test"
        )
    found = []
    for name, location in images.items():
        split, inner = name.split("/", 1) if tops & _SPLITS else (default_split, name)
        class_name = inner.split("/", 1)[0] if "/" in inner else None
        found.append(
            FoundImage(name, split, FLAT if class_name is None else CLASSES, location, class_name)
        )
    return found


def _without_wrapper(files: dict[str, Location]) -> dict[str, Location]:
    """The files without a top folder that only wraps the others, as archives often have."""
    tops = {name.partition("/")[0] for name in files}
    direct = any(name.count("/") < 2 for name in files if suffix_of(name) in IMAGE_SUFFIXES)
    if len(tops) != 1 or direct or tops & _SPLITS:
        return files
    return {name.partition("/")[2]: location for name, location in files.items()}


def _check_kinds(images: list[FoundImage]) -> None:
    """Raises UsageError where one split mixes labelled and unlabelled images, or classes and COCO."""
    for split in sorted({image.split for image in images}):
        firsts = {image.kind: image.location for image in reversed(images) if image.split == split}
        if len(firsts) > 1:
            described = " and ".join(f"{kind} ({firsts[kind]})" for kind in sorted(firsts))
            raise UsageError(
                f"split {split} would mix {described}; pack them apart or give them folders train, val, test"
            )


def _check_image_ids(images: list[FoundImage]) -> None:
    """Raises UsageError where a COCO id means two images of one split: results could not be told apart."""
    counts = Counter(
        (image.split, image.image_id) for image in images if image.image_id is not None
    )
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise UsageError(
            f"split {twice[0][0]}: {len(twice)} COCO image ids occur twice, first {twice[0][1]}"
        )


def _classes(images: list[FoundImage]) -> tuple[str, ...]:
    names = sorted({image.class_name for image in images if image.class_name is not None})
    if len(names) == 1:
        logger.warning(
            "packed without labels: all images are in one folder, %r, so it tells nothing", names[0]
        )
        return ()
    return tuple(names)


def _unite_categories(scans: list[Scan]) -> tuple[dict[str, Any], ...]:
    united: dict[int, dict[str, Any]] = {}
    for category in (category for scan in scans for category in scan.categories):
        known = united.setdefault(category["id"], category)
        if known.get("name") != category.get("name"):
            names = f"{known.get('name')!r} and {category.get('name')!r}"
            raise UsageError(
                f"category {category['id']} is both {names}; pack these COCO files apart"
            )
    return tuple(united[i] for i in sorted(united))


def _unique_keys(images: list[FoundImage]) -> list[str]:
    """A key per image: its name without suffix; the second of equal ones ends in `-2`."""
    taken: set[str] = set()
    keys = []
    for image in images:
        # names that are not UTF-8 on disk could not be written to a log or a table
        base = (
            re.sub(r"[./]", "_", image.name.rpartition(".")[0]).encode("utf-8", "replace").decode()
        )
        key, count = base, 1
        while key in taken:
            count += 1
            key = f"{base}-{count}"
        taken.add(key)
        keys.append(key)
    return keys


def _describe(files: dict[str, Location]) -> str:
    counts = sorted(
        Counter(suffix_of(name) for name in files).items(),
        key=lambda item: (-item[1], item[0] == "", item),
    )
    return ", ".join(
        f"{count} .{suffix}" if suffix else f"{count} without suffix"
        for suffix, count in counts[:5]
    ) or ("nothing")
