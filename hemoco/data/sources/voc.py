"""Pascal VOC folders (Everingham et al. 2010).

A folder holds `JPEGImages/`, `Annotations/*.xml` and `ImageSets/Main/*.txt`.
Annotations are converted to the form of COCO. VOC counts pixels from 1 and its boxes include both
corners; COCO measures from the corner of the image. So x = xmin - 1, y = ymin - 1,
width = xmax - xmin + 1 and height = ymax - ymin + 1. Boxes that are empty or reach outside their
image are kept unchanged.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from hemoco.data.shards.tar import IMAGE_SUFFIXES
from hemoco.data.sources.files import Location, read_files
from hemoco.data.sources.scan import ANNOTATED, Scan, SourceImage, suffix_of
from hemoco.errors import ShardError

_SPLITS = ("train", "val", "test")
# Split of the images that no list names. VOC2012 contains images of VOC2007's test split, which its
# lists leave out: nothing must train on them.
_UNLISTED = "unlisted"


class _Folder(NamedTuple):
    """One VOC folder."""

    root: str
    """Path in the source: empty, or ending in a slash."""
    images: dict[str, Location]
    """Images by name without suffix."""
    annotations: dict[str, Location]
    """XML files by name without suffix, which is the name of the image."""
    lists: dict[str, Location]
    """Lists by split."""


class _Object(NamedTuple):
    name: str
    box: list[float]
    """xmin, ymin, xmax, ymax, as in the XML file."""
    difficult: int
    truncated: int


def is_voc(files: dict[str, Location]) -> bool:
    """Returns True if a source has folders JPEGImages and Annotations side by side."""
    return bool(_roots(files))


def scan_voc(listings: Sequence[dict[str, Location]], default_split: str) -> Scan:
    """The images of VOC folders with their objects as COCO annotations, as one data set.

    Ids of images and annotations follow the order of the listings and of the names in them;
    categories are sorted by name. All ids start at 1. Besides COCO's fields, an annotation has
    VOC's `difficult` and `truncated`.

    Args:
        listings: files of each source by their names in it; each holds one or more VOC folders.
        default_split: split of the images of a folder without train.txt, val.txt and test.txt. In a
            folder that has any of these lists, images that none of them names get the split
            `unlisted`.

    Raises:
        ShardError: images and XML files do not correspond one to one, a list names an image that is
            not there or that another list names, or an XML file is damaged.
    """
    folders = [_open(files, root) for files in listings for root in _roots(files)]
    objects_of = [_read_objects(folder) for folder in folders]
    names: set[str] = set()
    for by_stem in objects_of:
        for objects in by_stem.values():
            names.update(each.name for each in objects)
    category_ids = {name: number for number, name in enumerate(sorted(names), 1)}
    annotation_ids = itertools.count(1)
    images: list[SourceImage] = []
    for folder, by_stem in zip(folders, objects_of, strict=True):
        splits = _splits(folder)
        for stem, location in sorted(folder.images.items()):
            image_id = len(images) + 1
            annotations = []
            for each in by_stem[stem]:
                ids = {
                    "id": next(annotation_ids),
                    "image_id": image_id,
                    "category_id": category_ids[each.name],
                }
                annotations.append(ids | _coco(each))
            image = SourceImage(
                name=f"{folder.root}{stem}.{suffix_of(str(location))}",
                split=splits.get(stem, _UNLISTED if splits else default_split),
                kind=ANNOTATED,
                location=location,
                annotations=annotations,
                image_id=image_id,
            )
            images.append(image)
    return Scan(images, [{"id": number, "name": name} for name, number in category_ids.items()])


def _roots(files: dict[str, Location]) -> list[str]:
    """Paths of the VOC folders in a source, each empty or ending in a slash."""
    with_images = _parents(files, "JPEGImages", IMAGE_SUFFIXES)
    with_annotations = _parents(files, "Annotations", ("xml",))
    return sorted(with_images & with_annotations)


def _parents(files: dict[str, Location], folder: str, suffixes: Sequence[str]) -> set[str]:
    """Paths that contain a folder of this name with files of these suffixes."""
    heads = {name.rpartition("/")[0] for name in files if suffix_of(name) in suffixes}
    return {head.removesuffix(folder) for head in heads if f"/{head}".endswith(f"/{folder}")}


def _open(files: dict[str, Location], root: str) -> _Folder:
    images = _by_stem(files, f"{root}JPEGImages", IMAGE_SUFFIXES)
    annotations = _by_stem(files, f"{root}Annotations", ("xml",))
    for stem in sorted(images.keys() ^ annotations.keys()):
        if stem in images:
            raise ShardError(
                f"{images[stem]}: no XML file in Annotations describes it; add one, or remove the "
                "image"
            )
        raise ShardError(
            f"{annotations[stem]}: its image is not in JPEGImages; add it, or remove the XML file"
        )
    lists = _by_stem(files, f"{root}ImageSets/Main", ("txt",))
    return _Folder(root, images, annotations, lists)


def _by_stem(
    files: dict[str, Location], folder: str, suffixes: Sequence[str]
) -> dict[str, Location]:
    """The files in a folder with one of these suffixes, by their names without it."""
    by_stem: dict[str, Location] = {}
    for name, location in files.items():
        head, _, last = name.rpartition("/")
        if head == folder and suffix_of(last) in suffixes:
            stem = last.rpartition(".")[0]
            if stem in by_stem:
                raise ShardError(
                    f"{location}: {by_stem[stem]} differs in its suffix only; keep one of them"
                )
            by_stem[stem] = location
    return by_stem


def _splits(folder: _Folder) -> dict[str, str]:
    """The split of each listed image."""
    splits: dict[str, str] = {}
    for split in _SPLITS:
        if split not in folder.lists:
            continue
        location = folder.lists[split]
        lines = read_files([location])[0].decode(errors="replace").splitlines()
        for stem in [line.strip() for line in lines]:
            if not stem:
                continue
            if stem not in folder.images:
                raise ShardError(
                    f"{location}: it lists {stem!r}, which is not in JPEGImages; correct the list"
                )
            if splits.setdefault(stem, split) != split:
                raise ShardError(
                    f"{location}: it lists {stem!r}, which {splits[stem]}.txt has too; "
                    "keep it in one"
                )
    return splits


def _read_objects(folder: _Folder) -> dict[str, list[_Object]]:
    """The objects of each image, by its name without suffix."""
    stems = sorted(folder.annotations)
    locations = [folder.annotations[stem] for stem in stems]
    objects = {}
    for stem, location, data in zip(stems, locations, read_files(locations), strict=True):
        try:
            objects[stem] = _parse(data, stem)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise ShardError(
                f"{location}: not an annotation of VOC ({error}); correct or remove it"
            ) from error
    return objects


def _parse(data: bytes, stem: str) -> list[_Object]:
    """The objects in an XML file, without their parts (heads, hands, feet).

    Raises:
        ElementTree.ParseError, ValueError, LookupError: it is damaged, or of another image.
    """
    # A DOCTYPE can define entities that expand without end ("billion laughs"). UTF-16 has a NUL
    # in each of these letters.
    if b"<!DOCTYPE" in data.replace(b"\0", b""):
        raise ValueError("it has a DOCTYPE, which annotations have no use for")
    root = ElementTree.fromstring(data)
    if root.tag != "annotation":
        raise ValueError(f"its root is {root.tag!r}, not 'annotation'")
    named = PurePosixPath((root.findtext("filename") or stem).strip().replace("\\", "/")).name
    if stem not in (named, named.rpartition(".")[0]):
        raise ValueError(f"it is of the image {named!r} by its <filename>")
    return [_object(element) for element in root.findall("object")]


def _object(element: ElementTree.Element) -> _Object:
    def text(name: str, default: str | None = None) -> str:
        value = (element.findtext(name) or "").strip() or default
        if value is None:
            raise ValueError(f"an object has no {name}")
        return value

    box = [float(text(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
    if not all(map(math.isfinite, box)):
        raise ValueError(f"an object has the box {box}")
    return _Object(text("name"), box, int(text("difficult", "0")), int(text("truncated", "0")))


def _coco(each: _Object) -> dict[str, Any]:
    """An object in the form of COCO, without ids."""
    left, top, right, bottom = each.box
    width, height = right - left + 1, bottom - top + 1
    bbox = [left - 1, top - 1, width, height]
    return {
        "bbox": [int(side) if side.is_integer() else side for side in bbox],
        "area": max(width, 0) * max(height, 0),
        "iscrowd": 0,
        "difficult": each.difficult,
        "truncated": each.truncated,
    }
