"""The images of one layout, before several layouts are united into one source."""

import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from hemoco.data.sources.files import Location
from hemoco.errors import UsageError

CLASSES = "images in class folders"
FLAT = "images without a class"
ANNOTATED = "images with annotations"


class SourceImage(NamedTuple):
    """One image of a source."""

    name: str
    """Its path in the source, from which its key is made."""
    split: str
    kind: str
    """CLASSES, FLAT or ANNOTATED; a split has images of one kind."""
    location: Location
    class_name: str | None = None
    annotations: list[dict[str, Any]] | None = None
    """In the form of COCO."""
    image_id: int | None = None


class Scan(NamedTuple):
    """The images of one or more layouts, and the categories of their annotations."""

    images: list[SourceImage]
    categories: list[dict[str, Any]]


def suffix_of(name: str) -> str:
    """The suffix of a file name, in lower case and without the dot."""
    return PurePosixPath(name).suffix.lower().removeprefix(".")


def check_split_name(name: str) -> None:
    """Raises UsageError if a split's name could not be the start of a file name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UsageError(f"split {name!r}: use letters, digits, _ and -")
