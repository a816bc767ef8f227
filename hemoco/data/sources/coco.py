"""COCO files (`instances_train.json` and so on) beside the images that they describe."""

import json
import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from hemoco.data.sources.files import Location, read_files
from hemoco.data.sources.scan import ANNOTATED, Scan, SourceImage
from hemoco.errors import ShardError

_COCO_KEYS = {"images", "annotations", "categories"}


def scan_coco(
    files: dict[str, Location], images: dict[str, Location], default_split: str
) -> Scan | None:
    """The images that COCO files list, each with its annotations; None if there are no such files.

    Args:
        files: all files of the source, by their names in it.
        images: those that are images.
        default_split: split of the images in `instances_all.json`.

    Raises:
        ShardError: a file is damaged, contradicts itself, or lists images that are not there.
    """
    coco_files = _coco_files(files)
    if not coco_files:
        return None
    scan = Scan([], [])
    for file in coco_files:
        part = _scan_file(file, file.split or default_split, images)
        scan.images.extend(part.images)
        scan.categories.extend(part.categories)
    return scan


class _CocoFile(NamedTuple):
    split: str | None
    """None for `instances_all.json`."""
    location: Location
    content: dict[str, Any]


def _coco_files(files: dict[str, Location]) -> list[_CocoFile]:
    """COCO files at the top or in `annotations/`; only `instances_*` if there are any of them."""
    names = [name for name in files if re.fullmatch(r"(annotations/)?[^/]+\.json", name)]
    instances = [name for name in names if PurePosixPath(name).name.startswith("instances_")]
    coco_files = []
    for name in instances or names:
        location = files[name]
        try:
            content = json.loads(read_files([location])[0])
        except ValueError as error:
            raise ShardError(f"{location}: not JSON ({error}); correct or remove it") from error
        if not isinstance(content, dict) or not content.keys() >= _COCO_KEYS:
            continue
        split = PurePosixPath(name).stem.removeprefix("instances_")
        split = re.sub(r"[^A-Za-z0-9_-]", "_", split)
        coco_files.append(_CocoFile(None if split == "all" else split, location, content))
    return coco_files


def _scan_file(file: _CocoFile, split: str, images: dict[str, Location]) -> Scan:
    location, content = file.location, file.content
    annotations: dict[int, list[dict[str, Any]]] = {}  # by image id
    file_names: dict[int, str] = {}  # by image id, as COCO has them
    try:
        for image in content["images"]:
            annotations[image["id"]] = []
            file_names[image["id"]] = str(image["file_name"])
        categories = {category["id"]: category for category in content["categories"]}
        for annotation in content["annotations"]:
            known_category = annotation["category_id"] in categories
            if not known_category or annotation["image_id"] not in annotations:
                raise ShardError(
                    f"{location}: annotation {annotation.get('id')} is of an unknown image or "
                    "category"
                )
            annotations[annotation["image_id"]].append(annotation)
    except (KeyError, TypeError) as error:
        raise ShardError(
            f"{location}: not a COCO file ({type(error).__name__}: {error})"
        ) from error
    repeated = len(content["images"]) - len(file_names)
    if repeated:
        raise ShardError(f"{location}: {repeated} of its images have the id of another")
    scan = Scan([], list(categories.values()))
    missing = []
    for image_id, file_name in file_names.items():
        name = _find_image(file_name, split, images)
        if name is None:
            missing.append(file_name)
            continue
        scan.images.append(
            SourceImage(
                name=name,
                split=split,
                kind=ANNOTATED,
                location=images[name],
                annotations=annotations[image_id],
                image_id=image_id,
            )
        )
    if missing:
        raise ShardError(
            f"{location}: {len(missing)} of its {len(file_names)} images are not there, "
            f"first {missing[0]!r}"
        )
    return scan


def _find_image(file_name: str, split: str, images: dict[str, Location]) -> str | None:
    """The name in the source of an image that COCO names; None if it is not there.

    Only listed names are compared, so a file name with `..` leads nowhere.
    """
    for name in (f"{split}/{file_name}", f"images/{file_name}", file_name):
        if name in images:
            return name
    return None
