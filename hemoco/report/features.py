"""The part of a report that shows what a backbone has learned: a map of features, nearest images, drawn detections."""

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
_MOST_RUNS = 6  # with a map each


class FeatureMap(NamedTuple):
    """Thumbnails arranged by the similarity of their features, or the reason why there is no map."""

    title: str
    caption: str
    """The reason where `png` is None."""
    png: bytes | None = None
    alt: str = ""
    legend: Sequence[tuple[str, str]] = ()
    """Name and colour of each class."""


class Tile(NamedTuple):
    """One image among its neighbours."""

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
    """None where the sample has a single image."""


class Picture(NamedTuple):
    """A PNG that a transfer drew."""

    title: str
    png: bytes


def feature_views(data: ReportData) -> list[Features]:
    """A map and nearest images for each pretraining with a recorded sample of features; once for repeated ones."""
    views: list[Features] = []
    for detail in data.examples:
        if detail.sample is not None and len(views) < _MOST_RUNS:
            of = _of(data, detail)
            views.append(
                Features(_map(detail.sample, f"{of}Feature map"), _neighbours(detail.sample, of))
            )
    return views


def drawn_detections(data: ReportData) -> list[Picture]:
    """Detections beside the ground truth, as transfers drew them."""
    return _pictures(data, is_confusion=False)


def drawn_confusions(data: ReportData) -> list[Picture]:
    """Confusion matrices, as transfers drew them."""
    return _pictures(data, is_confusion=True)


def _pictures(data: ReportData, *, is_confusion: bool) -> list[Picture]:
    pictures = []
    for detail in data.examples:
        for image in detail.images:
            if image.name.endswith(_CONFUSION) == is_confusion:
                name = image.name.removesuffix(_CONFUSION).replace("_", " ")
                pictures.append(Picture(f"{_of(data, detail)}{image.transfer}: {name}", image.png))
    return pictures


def _map(sample: FeatureSample, title: str) -> FeatureMap:
    if len(sample.keys) < MIN_IMAGES:
        return FeatureMap(title, f"Split {sample.split!r} has too few images for a map.")
    if all_alike(sample):
        return FeatureMap(title, "All images have the same features: the backbone has collapsed.")
    return FeatureMap(
        title=title,
        caption=(
            f"{len(sample.keys)} images of split {sample.split} where t-SNE puts their frozen features, each in the "
            "nearest free cell: similar ones lie together. Distances between groups mean nothing."
        ),
        png=draw_map(sample),
        alt=f"{len(sample.keys)} thumbnails of split {sample.split}, those with similar features near each other",
        legend=list(zip(sample.classes, CLASS_COLOURS, strict=False))
        if has_colours(sample)
        else (),
    )


def _neighbours(sample: FeatureSample, of: str) -> Neighbours | None:
    count = min(_NEIGHBOURS, len(sample.keys) - 1)
    if count < 1:
        return None
    near = nearest(sample, count)
    tiles = []
    for row in chosen_rows(sample, _QUERIES):
        own = int(sample.labels[row])
        tiles.append(_tile(sample, row, kind="query", caption=_name(sample, row)))
        for other in near[row]:
            same = " ✓" if own >= 0 and int(sample.labels[other.row]) == own else ""
            tiles.append(
                _tile(sample, other.row, kind="near", caption=f"{other.similarity:.2f}{same}")
            )
    note = (
        f"Left: an image of split {sample.split}. Right: the nearest of {len(sample.keys) - 1} others by the cosine "
        "of their frozen features."
    )
    share = same_label_share(sample, near)
    if share is not None:
        note += f" The nearest has the same label for {100 * share:.0f}% of the images; ✓ marks the same label."
    return Neighbours(f"{of}Nearest images", count + 1, tiles, note)


def _tile(sample: FeatureSample, row: int, *, kind: Literal["query", "near"], caption: str) -> Tile:
    png = encode_png(thumbnail(sample, row))
    return Tile(kind, png, f"image {sample.keys[row]}, {_name(sample, row)}", caption)


def _name(sample: FeatureSample, row: int) -> str:
    label = int(sample.labels[row])
    return sample.classes[label] if 0 <= label < len(sample.classes) else sample.keys[row]


def _of(data: ReportData, detail: RunDetail) -> str:
    return f"{detail.run.label}: " if len(data.details) > 1 else ""
