"""COCO annotations as they are met with, made fit for training and evaluation.

Shapes: H x W an image.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

_TOLERANCE = 0.01  # pixels: boxes of polygons are rounded to two decimals


class CleanAnnotations(NamedTuple):
    """The annotations of an image that can be used, and what that took."""

    kept: list[dict[str, Any]]
    counts: Counter[str]


def clean_annotations(
    annotations: Sequence[dict[str, Any]], height: int, width: int, *, masks: bool
) -> CleanAnnotations:
    """Clips boxes to the image, drops annotations without area or mask, and fills in what COCO files may omit.

    Raises:
        KeyError, TypeError or ValueError: an annotation is none.
    """
    kept: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for item in annotations:
        x, y, wide, high = map(float, item["bbox"])
        left, top, right, bottom = (
            max(x, 0.0),
            max(y, 0.0),
            min(x + wide, width),
            min(y + high, height),
        )
        mask = _clean_mask(item.get("segmentation"), height, width) if masks else _NO_MASK
        counts["masks_of_another_size"] += mask.of_another_size
        # not the other way round: comparisons with NaN are false
        has_area = right - left > _TOLERANCE and bottom - top > _TOLERANCE
        if not has_area or (masks and not mask.segmentation):
            counts["annotations_dropped"] += 1
            continue
        counts["annotations_clipped"] += (
            max(left - x, top - y, x + wide - right, y + high - bottom) > _TOLERANCE
        )
        box = [left, top, right - left, bottom - top]
        clean = (
            {"area": box[2] * box[3]}
            | item
            | {"bbox": box, "iscrowd": int(item.get("iscrowd") or 0)}
        )
        clean.pop("segmentation", None)
        kept.append(clean | ({"segmentation": mask.segmentation} if masks else {}))
    return CleanAnnotations(kept, counts)


class _Mask(NamedTuple):
    segmentation: list[list[float]] | dict[str, Any] | None
    """None where there is none that can be used."""
    of_another_size: bool = False


_NO_MASK = _Mask(None)


def _clean_mask(segmentation: Any, height: int, width: int) -> _Mask:
    """Polygons of three corners or more, or RLE of the image's size."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        fits = list(segmentation["size"]) == [height, width]
        # decoders write beyond the mask
        fits = fits and (not isinstance(counts, list) or sum(counts) == height * width)
        return _Mask(segmentation) if fits else _Mask(None, of_another_size=True)
    # decoders take four numbers for a box
    polygons = [
        polygon for polygon in segmentation or [] if len(polygon) >= 6 and len(polygon) % 2 == 0
    ]
    return _Mask(polygons or None)
