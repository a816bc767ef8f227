"""The part of a report about features: a map of them, nearest images, and transfers' pictures."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from hemoco.features.map import (
    CLASS_COLOURS,
    MIN_IMAGES,
    all_alike,
    chosen_rows,
    draw_map,
    encode_png,
    has_colours,
    nearest,
    same_label_share,
    thumbnail,
)
from hemoco.features.sample import FeatureSample
from hemoco.report.data import ReportData, RunDetail

_QUERIES, _NEIGHBOURS = 8, 6
_CONFUSION = "_confusion"
"""End of the names of confusion matrices; all other pictures of transfers show detections."""
_MOST_RUNS = 6
"""Most runs with a map: each adds its images to the file."""


class FeatureMap(NamedTuple):
    """Thumbnails arranged by the similarity of their features, or the reason for having none."""

    title: str
    caption: str
    """If `png` is None, the reason for that."""
    png: bytes | None = None
    alt: str = ""
    legend: Sequence[tuple[str, str]] = ()
    """Name and colour of each class."""


class Tile(NamedTuple):
    """One image of a grid of neighbours."""

    kind: Literal["query", "near"]
    png: bytes
    alt: str
    caption: str


class Neighbours(NamedTuple):
    """A grid of images: each row has a query and its nearest images."""

    title: str
    columns: int
    tiles: Sequence[Tile]
    note: str


class Features(NamedTuple):
    """The features of one pretraining."""

    map: FeatureMap
    neighbours: Neighbours | None
    """None if the sample has a single image."""


class Picture(NamedTuple):
    """A PNG recorded by a transfer."""

    title: str
    png: bytes


def feature_views(data: ReportData) -> list[Features]:
    """Returns a map and nearest images for each pretraining that recorded a sample of features.

    Repetitions of a pretraining have one map.
    """
    views: list[Features] = []
    for detail in data.examples:
        if detail.sample is not None and len(views) < _MOST_RUNS:
            prefix = _title_prefix(data, detail)
            feature_map = _map(detail.sample, f"{prefix}Feature map")
            neighbours = _neighbours(detail.sample, f"{prefix}Nearest images")
            views.append(Features(feature_map, neighbours))
    return views


def drawn_detections(data: ReportData) -> list[Picture]:
    """Returns pictures of detections beside the ground truth."""
    return _pictures(data, is_confusion=False)


def drawn_confusions(data: ReportData) -> list[Picture]:
    """Returns pictures of confusion matrices."""
    return _pictures(data, is_confusion=True)


def _pictures(data: ReportData, *, is_confusion: bool) -> list[Picture]:
    pictures = []
    for detail in data.examples:
        for image in detail.images:
            if image.name.endswith(_CONFUSION) == is_confusion:
                name = image.name.removesuffix(_CONFUSION).replace("_", " ")
                title = f"{_title_prefix(data, detail)}{image.transfer}: {name}"
                pictures.append(Picture(title, image.png))
    return pictures


def _map(sample: FeatureSample, title: str) -> FeatureMap:
    if len(sample.keys) < MIN_IMAGES:
        return FeatureMap(title, f"Split {sample.split!r} has too few images for a map.")
    if all_alike(sample):
        return FeatureMap(title, "All images have the same features: the backbone has collapsed.")
    legend: list[tuple[str, str]] = []
    if has_colours(sample):
        legend = list(zip(sample.classes, CLASS_COLOURS, strict=False))
    return FeatureMap(
        title=title,
        caption=(
            f"{len(sample.keys)} images of split {sample.split}, arranged by t-SNE of their frozen "
            "features: each image is in the free cell nearest to its t-SNE position, so similar "
            "images are neighbours. Distances between groups have no meaning."
        ),
        png=draw_map(sample),
        alt=(
            f"{len(sample.keys)} thumbnails of split {sample.split}; "
            "those with similar features are near each other"
        ),
        legend=legend,
    )


def _neighbours(sample: FeatureSample, title: str) -> Neighbours | None:
    count = min(_NEIGHBOURS, len(sample.keys) - 1)
    if count < 1:
        return None
    near = nearest(sample, count)
    tiles = []
    for row in chosen_rows(sample, _QUERIES):
        label = int(sample.labels[row])
        tiles.append(_tile(sample, row, kind="query", caption=_name(sample, row)))
        for other in near[row]:
            caption = f"{other.similarity:.2f}"
            if label >= 0 and int(sample.labels[other.row]) == label:
                caption += " ✓"
            tiles.append(_tile(sample, other.row, kind="near", caption=caption))
    note = (
        f"Left: an image of split {sample.split}. Right: its nearest neighbours among "
        f"{len(sample.keys) - 1} others, by cosine similarity of frozen features."
    )
    share = same_label_share(sample, near)
    if share is not None:
        note += (
            f" ✓ marks the same label as on the left. For {100 * share:.0f}% of the images, the "
            "nearest neighbour has the same label."
        )
    return Neighbours(title, count + 1, tiles, note)


def _tile(sample: FeatureSample, row: int, *, kind: Literal["query", "near"], caption: str) -> Tile:
    png = encode_png(thumbnail(sample, row))
    return Tile(kind, png, f"image {sample.keys[row]}, {_name(sample, row)}", caption)


def _name(sample: FeatureSample, row: int) -> str:
    """Returns the name of an image's class, or its key if it has none."""
    label = int(sample.labels[row])
    return sample.classes[label] if 0 <= label < len(sample.classes) else sample.keys[row]


def _title_prefix(data: ReportData, detail: RunDetail) -> str:
    """Returns the run's label where a report shows several runs."""
    return f"{detail.run.label}: " if len(data.details) > 1 else ""
