"""Sources: what people have (class folders, flat folders, archives of them, COCO) as one list of images.

Folders `train/`, `val/`, `test/` at the top of a source are its splits; below them, or at the top when there are
none, a folder is a class. Only listings are made here; images are read by `read_items`, anywhere.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from hemoco.data.files import Location, list_files, read_files
from hemoco.data.shards import IMAGE_SUFFIXES
from hemoco.errors import ShardError, UsageError

logger = logging.getLogger(__name__)

_SPLITS = {"train", "val", "test"}
_COCO_KEYS = {"images", "annotations", "categories"}
_CLASSES, _FLAT, _COCO = "images in class folders", "images without a class", "images with COCO annotations"


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


class _Image(NamedTuple):
    name: str
    split: str
    kind: str
    location: Location
    class_name: str | None = None
    annotations: list[dict[str, Any]] | None = None
    image_id: int | None = None


class _Scan(NamedTuple):
    images: list[_Image]
    categories: list[dict[str, Any]]


def open_source(paths: Sequence[str], default_split: str) -> Source:
    """Lists the images of folders and archives as one source; their classes are united.

    Args:
        paths: local folders, zip or tar archives.
        default_split: split of images that no folder `train/`, `val/` or `test/` puts in one.

    Raises:
        UsageError: a path is missing or holds no images, or paths contradict each other.
        ShardError: an archive or a COCO file is damaged.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", default_split):
        raise UsageError(f"split {default_split!r}: use letters, digits, _ and -")
    scans = [_scan(path, default_split) for path in paths]
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
            suffix=_suffix(image.name),
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


def _scan(path: str, default_split: str) -> _Scan:
    files = _without_wrapper(list_files(path))
    images = {name: location for name, location in files.items() if _suffix(name) in IMAGE_SUFFIXES}
    if not images:
        raise UsageError(f"{path}: no images ({', '.join(IMAGE_SUFFIXES)}); found {_describe(files)}")
    coco = _coco_files(files)
    if not coco:
        return _Scan(_folder_images(path, images, default_split), [])
    scans = [_coco_images(location, split or default_split, fields, images) for split, location, fields in coco]
    return _Scan([i for scan in scans for i in scan.images], [c for scan in scans for c in scan.categories])


def _folder_images(path: str, images: dict[str, Location], default_split: str) -> list[_Image]:
    tops = {name.partition("/")[0] if "/" in name else "" for name in images}
    if tops & _SPLITS and tops - _SPLITS:
        others = ", ".join(sorted(top and f"folder {top}" for top in tops - _SPLITS)) or "images beside them"
        splits = ", ".join(sorted(tops & _SPLITS))
        raise UsageError(f"{path}: {splits} are splits, but there are also {others}; keep only train, val and test")
    found = []
    for name, location in images.items():
        split, inner = name.split("/", 1) if tops & _SPLITS else (default_split, name)
        class_name = inner.split("/", 1)[0] if "/" in inner else None
        found.append(_Image(name, split, _FLAT if class_name is None else _CLASSES, location, class_name))
    return found


class _CocoFile(NamedTuple):
    split: str | None
    location: Location
    fields: dict[str, Any]


def _coco_files(files: dict[str, Location]) -> list[_CocoFile]:
    """COCO files at the top or in `annotations/`; those named `instances_*` if there are any."""
    names = [name for name in files if re.fullmatch(r"(annotations/)?[^/]+\.json", name)]
    instances = [name for name in names if PurePosixPath(name).name.startswith("instances_")]
    found = []
    for name in instances or names:
        fields = _read_json(files[name])
        if isinstance(fields, dict) and fields.keys() >= _COCO_KEYS:
            split = re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(name).stem.removeprefix("instances_"))
            found.append(_CocoFile(None if split == "all" else split, files[name], fields))
    return found


def _coco_images(location: Location, split: str, fields: dict[str, Any], images: dict[str, Location]) -> _Scan:
    """The images that a COCO file lists, each with its annotations."""
    try:
        annotations: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in fields["images"]}
        categories = {category["id"]: category for category in fields["categories"]}
        for annotation in fields["annotations"]:
            if annotation["category_id"] not in categories or annotation["image_id"] not in annotations:
                raise ShardError(f"{location}: annotation {annotation.get('id')} is of an unknown image or category")
            annotations[annotation["image_id"]].append(annotation)
        wanted = {image["id"]: str(image["file_name"]) for image in fields["images"]}
        names = {i: _coco_name(file_name, split, images) for i, file_name in wanted.items()}
    except (KeyError, TypeError) as error:
        raise ShardError(f"{location}: not a COCO file ({type(error).__name__}: {error})") from error
    missing = [wanted[i] for i, name in names.items() if name is None]
    if len(names) < len(fields["images"]):
        raise ShardError(f"{location}: {len(fields['images']) - len(names)} of its images have the id of another")
    if missing:
        raise ShardError(f"{location}: {len(missing)} of its {len(names)} images are not there, first {missing[0]!r}")
    found = [
        _Image(name, split, _COCO, images[name], None, annotations[i], i)
        for i, name in names.items()
        if name is not None
    ]
    return _Scan(found, list(categories.values()))


def _coco_name(file_name: str, split: str, images: dict[str, Location]) -> str | None:
    """Which of the files it is; a lookup among listed names, so `..` in a file name finds nothing."""
    return next((name for name in (f"{split}/{file_name}", f"images/{file_name}", file_name) if name in images), None)


def _read_json(location: Location) -> Any:
    try:
        return json.loads(read_files([location])[0])
    except ValueError as error:
        raise ShardError(f"{location}: not JSON ({error}); correct or remove it") from error


def _without_wrapper(files: dict[str, Location]) -> dict[str, Location]:
    """The files without a top folder that only wraps the others, as archives often have."""
    tops = {name.partition("/")[0] for name in files}
    direct = any(name.count("/") < 2 for name in files if _suffix(name) in IMAGE_SUFFIXES)
    if len(tops) != 1 or direct or tops & _SPLITS:
        return files
    return {name.partition("/")[2]: location for name, location in files.items()}


def _check_kinds(images: list[_Image]) -> None:
    """Raises UsageError where one split mixes labelled and unlabelled images, or classes and COCO."""
    for split in sorted({image.split for image in images}):
        firsts = {image.kind: image.location for image in reversed(images) if image.split == split}
        if len(firsts) > 1:
            described = " and ".join(f"{kind} ({firsts[kind]})" for kind in sorted(firsts))
            raise UsageError(
                f"split {split} would mix {described}; pack them apart or give them folders train, val, test"
            )


def _check_image_ids(images: list[_Image]) -> None:
    """Raises UsageError where a COCO id means two images of one split: results could not be told apart."""
    counts = Counter((image.split, image.image_id) for image in images if image.image_id is not None)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise UsageError(f"split {twice[0][0]}: {len(twice)} COCO image ids occur twice, first {twice[0][1]}")


def _classes(images: list[_Image]) -> tuple[str, ...]:
    names = sorted({image.class_name for image in images if image.class_name is not None})
    if len(names) == 1:
        logger.warning("packed without labels: all images are in one folder, %r, so it tells nothing", names[0])
        return ()
    return tuple(names)


def _unite_categories(scans: list[_Scan]) -> tuple[dict[str, Any], ...]:
    united: dict[int, dict[str, Any]] = {}
    for category in (category for scan in scans for category in scan.categories):
        known = united.setdefault(category["id"], category)
        if known.get("name") != category.get("name"):
            names = f"{known.get('name')!r} and {category.get('name')!r}"
            raise UsageError(f"category {category['id']} is both {names}; pack these COCO files apart")
    return tuple(united[i] for i in sorted(united))


def _unique_keys(images: list[_Image]) -> list[str]:
    """A key per image: its name without suffix; the second of equal ones ends in `-2`."""
    taken: set[str] = set()
    keys = []
    for image in images:
        # names that are not UTF-8 on disk could not be written to a log or a table
        base = re.sub(r"[./]", "_", image.name.rpartition(".")[0]).encode("utf-8", "replace").decode()
        key, count = base, 1
        while key in taken:
            count += 1
            key = f"{base}-{count}"
        taken.add(key)
        keys.append(key)
    return keys


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower().removeprefix(".")


def _describe(files: dict[str, Location]) -> str:
    counts = sorted(Counter(_suffix(name) for name in files).items(), key=lambda item: (-item[1], item[0] == "", item))
    return ", ".join(f"{count} .{suffix}" if suffix else f"{count} without suffix" for suffix, count in counts[:5]) or (
        "nothing"
    )
