"""The part of a report that shows what a backbone has learned: a map of features, nearest images, drawn detections."""

from collections.abc import Sequence
from html import escape

from hemoco.features.map import (
    CLASS_COLOURS,
    MIN_IMAGES,
    NearImage,
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
from hemoco.report.data import ReportData, RunDetail, TransferImage
from hemoco.report.html import columns, data_uri, folded, section

_QUERIES, _NEIGHBOURS = 8, 6
_CONFUSION = "_confusion"
_MOST_RUNS = 6  # with a map each


def feature_sections(data: ReportData) -> list[str]:
    """A map and nearest images for each pretraining that has recorded a sample of features; of repeated ones once."""
    sampled = [detail for detail in data.examples if detail.sample is not None]
    return [part for detail in sampled[:_MOST_RUNS] for part in (_map(data, detail), _neighbours(data, detail))]


def image_sections(data: ReportData) -> list[str]:
    """What transfers have drawn: detections beside the ground truth, and confusion matrices, which are folded."""
    drawn = [(detail, image) for detail in data.examples for image in detail.images]
    detections = [_figure(data, *one) for one in drawn if not one[1].name.endswith(_CONFUSION)]
    confusions = [_figure(data, *one) for one in drawn if one[1].name.endswith(_CONFUSION)]
    note = (
        '<p class="note">Left the ground truth, right the highest-scored predictions, as many as there are objects.</p>'
    )
    found = [section("Detections", columns(detections) + note)] if detections else []
    shown = folded(f"All {len(confusions)}", columns(confusions))
    return found + ([section("Confusion matrices", shown)] if confusions else [])


def _figure(data: ReportData, detail: RunDetail, image: TransferImage) -> str:
    name = escape(f"{_of(data, detail)}{image.transfer}: {image.name.removesuffix(_CONFUSION).replace('_', ' ')}")
    picture = f'<img src="{data_uri(image.png, "image/png")}" alt="{name}"/>'
    return f"<figure><h3>{name}</h3>{picture}</figure>"


def _map(data: ReportData, detail: RunDetail) -> str:
    sample = detail.sample
    assert sample is not None, "the caller has looked"
    title = f"{_of(data, detail)}Feature map"
    if len(sample.keys) < MIN_IMAGES:
        return section(title, f"<p>Split {escape(sample.split)!r} has too few images for a map.</p>")
    if all_alike(sample):
        return section(title, "<p>All images have the same features: the backbone has collapsed.</p>")
    png = draw_map(sample)
    alt = f"{len(sample.keys)} thumbnails of split {sample.split}, those with similar features near each other"
    image = f'<img src="{data_uri(png, "image/png")}" alt="{escape(alt)}"/>'
    caption = (
        f"{len(sample.keys)} images of split {sample.split} where t-SNE puts their frozen features, each in the "
        "nearest free cell: similar ones lie together. Distances between groups mean nothing."
    )
    return section(title, f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>{_legend(sample)}")


def _legend(sample: FeatureSample) -> str:
    if not has_colours(sample):
        return ""
    keys = [
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in zip(sample.classes, CLASS_COLOURS, strict=False)
    ]
    return f"<div>{''.join(keys)}</div>"


def _neighbours(data: ReportData, detail: RunDetail) -> str:
    sample = detail.sample
    assert sample is not None, "the caller has looked"
    count = min(_NEIGHBOURS, len(sample.keys) - 1)
    if count < 1:
        return ""
    near = nearest(sample, count)
    tiles = "".join(_row_of_tiles(sample, row, near[row]) for row in chosen_rows(sample, _QUERIES))
    grid = f'<div class="neighbours" style="grid-template-columns:repeat({count + 1},minmax(0,1fr))">{tiles}</div>'
    share = same_label_share(sample, near)
    note = f"Left: an image of split {sample.split}. Right: the nearest of {len(sample.keys) - 1} others by the cosine "
    note += "of their frozen features."
    if share is not None:
        note += f" The nearest has the same label for {100 * share:.0f}% of the images; ✓ marks the same label."
    return section(f"{_of(data, detail)}Nearest images", f'{grid}<p class="note">{escape(note)}</p>')


def _row_of_tiles(sample: FeatureSample, row: int, near: Sequence[NearImage]) -> str:
    own = int(sample.labels[row])
    tiles = [_tile(sample, row, _name(sample, row), "query")]
    for other in near:
        same = own >= 0 and int(sample.labels[other.row]) == own
        tiles.append(_tile(sample, other.row, f"{other.similarity:.2f}{' ✓' if same else ''}", "near"))
    return "".join(tiles)


def _tile(sample: FeatureSample, row: int, caption: str, kind: str) -> str:
    image = data_uri(encode_png(thumbnail(sample, row)), "image/png")
    alt = f"image {sample.keys[row]}, {_name(sample, row)}"
    return (
        f'<figure class="{kind}" title="{escape(alt)}"><img src="{image}" alt="{escape(alt)}"/>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _name(sample: FeatureSample, row: int) -> str:
    label = int(sample.labels[row])
    return sample.classes[label] if 0 <= label < len(sample.classes) else sample.keys[row]


def _of(data: ReportData, detail: RunDetail) -> str:
    return f"{detail.run.label}: " if len(data.details) > 1 else ""
