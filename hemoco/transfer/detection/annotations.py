"""Cleaning of COCO annotations for training and evaluation.

Shapes: images are H x W pixels.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

_TOLERANCE = 0.01  # pixels: COCO files round the boxes of polygons to two decimals


class CleanAnnotations(NamedTuple):
    """The usable annotations of an image."""

    annotations: list[dict[str, Any]]
    counts: Counter[str]
    """Numbers of corrections, by the names in `hemoco.transfer.detection.data.COUNTS`."""


def clean_annotations(
    annotations: Sequence[dict[str, Any]], height: int, width: int, *, masks: bool
) -> CleanAnnotations:
    """Clips boxes to the image, drops annotations without area or mask, and fills in defaults.

    COCO files may omit `area`, which becomes that of the box, and `iscrowd`, which becomes 0.

    Args:
        annotations: COCO annotations of one image.
        height: H.
        width: W.
        masks: drop objects without a usable mask; if False, masks are removed instead.

    Raises:
        KeyError, TypeError, ValueError: an annotation is malformed.
    """
    clean: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for item in annotations:
        x, y, box_width, box_height = map(float, item["bbox"])
        left, top = max(x, 0.0), max(y, 0.0)
        right, bottom = min(x + box_width, width), min(y + box_height, height)
        # Written so that a box with nan has no area: comparisons with nan are False.
        usable = right - left > _TOLERANCE and bottom - top > _TOLERANCE
        mask = _NO_MASK
        if masks:
            mask = _clean_mask(item.get("segmentation"), height, width)
            counts["masks_of_another_size"] += mask.of_another_size
            usable = usable and bool(mask.segmentation)
        if not usable:
            counts["annotations_dropped"] += 1
            continue
        outside = max(left - x, top - y, x + box_width - right, y + box_height - bottom)
        counts["annotations_clipped"] += outside > _TOLERANCE
        box = [left, top, right - left, bottom - top]
        annotation = {"area": box[2] * box[3]} | item
        annotation["bbox"] = box
        annotation["iscrowd"] = int(item.get("iscrowd") or 0)
        annotation.pop("segmentation", None)
        if masks:
            annotation["segmentation"] = mask.segmentation
        clean.append(annotation)
    return CleanAnnotations(clean, counts)


class _Mask(NamedTuple):
    segmentation: list[list[float]] | dict[str, Any] | None
    """None if the object has no usable mask."""
    of_another_size: bool = False


_NO_MASK = _Mask(None)


def _clean_mask(segmentation: Any, height: int, width: int) -> _Mask:
    """Keeps polygons with at least three corners, and an RLE of the image's size."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        fits = list(segmentation["size"]) == [height, width]
        # The decoder trusts the counts: with too many it writes beyond the mask's memory.
        fits = fits and (not isinstance(counts, list) or sum(counts) == height * width)
        return _Mask(segmentation) if fits else _Mask(None, of_another_size=True)
    # The decoder reads four numbers as a box, so shorter polygons must not reach it.
    polygons = [
        polygon for polygon in segmentation or [] if len(polygon) >= 6 and len(polygon) % 2 == 0
    ]
    return _Mask(polygons or None)
