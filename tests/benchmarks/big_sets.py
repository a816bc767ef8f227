"""Data sets too large for the repository, or not ours to pass on.

Benchmarks read them from a folder they are given:

DIR/cifar10/train-0.zip .. train-4.zip, test.zip     CIFAR-10 as <split>/<class>/<name>.jpg,
                                                     10,000 images each
DIR/photos/**/*.jpg                                  photos of some 500 pixels, such as those of
                                                     COCO 2017 (val)
"""

import argparse
from pathlib import Path

ORIGIN = {
    "cifar10": (
        "CIFAR-10 (Krizhevsky 2009), its images written as JPEG into zips of "
        "<split>/<class>/<name>.jpg"
    ),
    "photos": (
        "JPEG photos of some 500 pixels in any subfolders, such as COCO 2017's val images or "
        "ImageNet's"
    ),
}
_HELP = (
    "folder with cifar10/ and photos/, as tests/benchmarks/big_sets.py describes; "
    "what is not read may be missing"
)


def add_data_option(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds `--data DIR`."""
    parser.add_argument("--data", type=Path, required=required, metavar="DIR", help=_HELP)


def cifar10_archives(data: Path, split: str) -> list[Path]:
    """The zips of a split, at least one.

    Raises:
        SystemExit: there is none; says which data set to get.
    """
    return _some(data / "cifar10", sorted((data / "cifar10").glob(f"{split}*.zip")))


def photo_files(data: Path) -> list[Path]:
    """All photos, at least one.

    Raises:
        SystemExit: there is none; says which data set to get.
    """
    return _some(data / "photos", sorted((data / "photos").rglob("*.jpg")))


def _some(folder: Path, found: list[Path]) -> list[Path]:
    if not found:
        raise SystemExit(f"{folder} has none of what is read here: {ORIGIN[folder.name]}")
    return found
