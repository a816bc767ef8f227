"""COCO files (`instances_train.json` and so on) beside the images they describe."""

import json
import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from hemoco.data.sources.files import Location, read_files
from hemoco.data.sources.found import ANNOTATED, FoundImage, Scan
from hemoco.errors import ShardError

_COCO_KEYS = {"images", "annotations", "categories"}


def scan_coco(
    files: dict[str, Location], images: dict[str, Location], default_split: str
) -> Scan | None:
    """The images that COCO files list, each with its annotations; None where there are no such files.

    Args:
        files: all of the source, by their names in it.
        images: those that are images.
        default_split: of the images in `instances_all.json`.

    Raises:
        ShardError: a file is damaged, contradicts itself, or lists images that are not there.
    """
    coco = _coco_files(files)
    if not coco:
        return None
    scans = [
        _coco_images(location, split or default_split, fields, images)
        for split, location, fields in coco
    ]
    return Scan(
        [i for scan in scans for i in scan.images], [c for scan in scans for c in scan.categories]
    )


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
            split = re.sub(
                r"[^A-Za-z0-9_-]", "_", PurePosixPath(name).stem.removeprefix("instances_")
            )
            found.append(_CocoFile(None if split == "all" else split, files[name], fields))
    return found


def _coco_images(
    location: Location, split: str, fields: dict[str, Any], images: dict[str, Location]
) -> Scan:
    """The images that a COCO file lists, each with its annotations."""
    try:
        annotations: dict[int, list[dict[str, Any]]] = {
            image["id"]: [] for image in fields["images"]
        }
        categories = {category["id"]: category for category in fields["categories"]}
        for annotation in fields["annotations"]:
            if (
                annotation["category_id"] not in categories
                or annotation["image_id"] not in annotations
            ):
                raise ShardError(
                    f"{location}: annotation {annotation.get('id')} is of an unknown image or category"
                )
            annotations[annotation["image_id"]].append(annotation)
        wanted = {image["id"]: str(image["file_name"]) for image in fields["images"]}
        names = {i: _coco_name(file_name, split, images) for i, file_name in wanted.items()}
    except (KeyError, TypeError) as error:
        raise ShardError(
            f"{location}: not a COCO file ({type(error).__name__}: {error})"
        ) from error
    missing = [wanted[i] for i, name in names.items() if name is None]
    if len(names) < len(fields["images"]):
        raise ShardError(
            f"{location}: {len(fields['images']) - len(names)} of its images have the id of another"
        )
    if missing:
        raise ShardError(
            f"{location}: {len(missing)} of its {len(names)} images are not there, first {missing[0]!r}"
        )
    found = [
        FoundImage(name, split, ANNOTATED, images[name], None, annotations[i], i)
        for i, name in names.items()
        if name is not None
    ]
    return Scan(found, list(categories.values()))


def _coco_name(file_name: str, split: str, images: dict[str, Location]) -> str | None:
    """Which of the files it is; a lookup among listed names, so `..` in a file name finds nothing."""
    return next(
        (
            name
            for name in (f"{split}/{file_name}", f"images/{file_name}", file_name)
            if name in images
        ),
        None,
    )


def _read_json(location: Location) -> Any:
    try:
        return json.loads(read_files([location])[0])
    except ValueError as error:
        raise ShardError(f"{location}: not JSON ({error}); correct or remove it") from error
