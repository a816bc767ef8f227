"""Pascal VOC folders (Everingham et al. 2010): `JPEGImages/`, `Annotations/*.xml` and `ImageSets/Main/*.txt`.

VOC counts pixels from 1 and its boxes include both corners; COCO, whose form the annotations get here, measures from
the corner of the image. So x = xmin - 1, y = ymin - 1, width = xmax - xmin + 1 and height = ymax - ymin + 1. Boxes that
are empty or reach outside their image are kept as they were.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from hemoco.data.shards.tar import IMAGE_SUFFIXES
from hemoco.data.sources.files import Location, read_files
from hemoco.data.sources.found import ANNOTATED, FoundImage, Scan, suffix_of
from hemoco.errors import ShardError

_SPLITS = ("train", "val", "test")
_UNLISTED = "unlisted"  # VOC2012 has images of VOC2007's test split beside its lists: they must not be trained on


class _Folder(NamedTuple):
    """One VOC folder."""

    root: str
    """Where it is in the source: nothing, or a path that ends in a slash."""
    images: dict[str, Location]
    """By their names without suffix, as the others."""
    annotations: dict[str, Location]
    lists: dict[str, Location]


class _Object(NamedTuple):
    name: str
    box: list[float]
    """xmin, ymin, xmax, ymax as VOC gives them."""
    difficult: int
    truncated: int


def is_voc(files: dict[str, Location]) -> bool:
    """Whether there are folders JPEGImages and Annotations side by side."""
    return bool(_roots(files))


def scan_voc(listings: Sequence[dict[str, Location]], default_split: str) -> Scan:
    """The images of VOC folders with their objects as COCO annotations, numbered as one data set.

    Ids of images and annotations follow the order of the listings and of the names in them; categories are sorted by
    name. All ids begin at 1. Beside COCO's fields an annotation has VOC's `difficult` and `truncated`.

    Args:
        listings: files of each source by their names in it; each holds one or more VOC folders.
        default_split: of the images of a folder without train.txt, val.txt and test.txt; in a folder that has some,
            images that none of them lists get the split `unlisted`.

    Raises:
        ShardError: images and XML files do not belong together one by one, a list names an image that is not there or
            that another list has, or an XML file is damaged.
    """
    folders = [_open(files, root) for files in listings for root in _roots(files)]
    objects = [_read_objects(folder) for folder in folders]
    names = sorted(
        {
            found.name
            for of_folder in objects
            for of_image in of_folder.values()
            for found in of_image
        }
    )
    category_ids = {name: number for number, name in enumerate(names, 1)}
    annotation_ids = itertools.count(1)
    images: list[FoundImage] = []
    for folder, of_folder in zip(folders, objects, strict=True):
        splits = _splits(folder)
        for stem, location in sorted(folder.images.items()):
            image_id = len(images) + 1
            annotations = [
                {
                    "id": next(annotation_ids),
                    "image_id": image_id,
                    "category_id": category_ids[found.name],
                }
                | _coco(found)
                for found in of_folder[stem]
            ]
            name = f"{folder.root}{stem}.{suffix_of(str(location))}"
            split = splits.get(stem, _UNLISTED if splits else default_split)
            images.append(FoundImage(name, split, ANNOTATED, location, None, annotations, image_id))
    return Scan(images, [{"id": number, "name": name} for name, number in category_ids.items()])


def _roots(files: dict[str, Location]) -> list[str]:
    return sorted(
        _parents(files, "JPEGImages", IMAGE_SUFFIXES) & _parents(files, "Annotations", ("xml",))
    )


def _parents(files: dict[str, Location], folder: str, suffixes: Sequence[str]) -> set[str]:
    """Where there is a folder of that name that holds such files."""
    heads = {name.rpartition("/")[0] for name in files if suffix_of(name) in suffixes}
    return {head.removesuffix(folder) for head in heads if f"/{head}".endswith(f"/{folder}")}


def _open(files: dict[str, Location], root: str) -> _Folder:
    def by_stem(folder: str, suffixes: Sequence[str]) -> dict[str, Location]:
        found: dict[str, Location] = {}
        for name, location in files.items():
            head, _, last = name.rpartition("/")
            if head == root + folder and suffix_of(last) in suffixes:
                stem = last.rpartition(".")[0]
                if stem in found:
                    raise ShardError(
                        f"{location}: {found[stem]} differs in its suffix only; keep one of them"
                    )
                found[stem] = location
        return found

    images, annotations = by_stem("JPEGImages", IMAGE_SUFFIXES), by_stem("Annotations", ("xml",))
    for stem in sorted(images.keys() ^ annotations.keys()):
        if stem in images:
            raise ShardError(
                f"{images[stem]}: no XML file in Annotations describes it; add one, or remove the image"
            )
        raise ShardError(
            f"{annotations[stem]}: its image is not in JPEGImages; add it, or remove the XML file"
        )
    return _Folder(root, images, annotations, by_stem("ImageSets/Main", ("txt",)))


def _splits(folder: _Folder) -> dict[str, str]:
    """The split of each listed image."""
    splits: dict[str, str] = {}
    for split in _SPLITS:
        if split not in folder.lists:
            continue
        location = folder.lists[split]
        for stem in filter(
            None, map(str.strip, read_files([location])[0].decode(errors="replace").splitlines())
        ):
            if stem not in folder.images:
                raise ShardError(
                    f"{location}: it lists {stem!r}, which is not in JPEGImages; correct the list"
                )
            if splits.setdefault(stem, split) != split:
                raise ShardError(
                    f"{location}: it lists {stem!r}, which {splits[stem]}.txt has too; keep it in one"
                )
    return splits


def _read_objects(folder: _Folder) -> dict[str, list[_Object]]:
    stems = sorted(folder.annotations)
    locations = [folder.annotations[stem] for stem in stems]
    found = {}
    for stem, location, data in zip(stems, locations, read_files(locations), strict=True):
        try:
            found[stem] = _parse(data, stem)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise ShardError(
                f"{location}: not an annotation of VOC ({error}); correct or remove it"
            ) from error
    return found


def _parse(data: bytes, stem: str) -> list[_Object]:
    """The objects of an XML file; parts of objects (heads, hands, feet) are left out.

    Raises:
        ElementTree.ParseError, ValueError or LookupError: it is damaged, or of another image.
    """
    # it could define entities that grow without end; without the NULs of UTF-16
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
        found = (element.findtext(name) or "").strip() or default
        if found is None:
            raise ValueError(f"an object has no {name}")
        return found

    box = [float(text(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
    if not all(map(math.isfinite, box)):
        raise ValueError(f"an object has the box {box}")
    return _Object(text("name"), box, int(text("difficult", "0")), int(text("truncated", "0")))


def _coco(found: _Object) -> dict[str, Any]:
    left, top, right, bottom = found.box
    width, height = right - left + 1, bottom - top + 1
    bbox = [left - 1, top - 1, width, height]
    return {
        "bbox": [int(side) if side.is_integer() else side for side in bbox],
        "area": max(width, 0) * max(height, 0),
        "iscrowd": 0,
        "difficult": found.difficult,
        "truncated": found.truncated,
    }
