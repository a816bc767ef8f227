"""Average precision as the development kit of Pascal VOC computes it (Everingham et al. 2010, section 4.2).

Detections of a category are taken by falling score over all images. Each is compared with the object of its image and
category that it overlaps most: below the threshold it is a false positive; at or above it is a true positive the first
time, a false positive every further time, and nothing at all if the object is difficult. There is no limit of
detections. Crowds, which VOC has not, are taken as difficult.

VOC's boxes include both corner pixels, so its kit adds 1 to every width. Boxes of COCO's form hold that 1 already:
x = xmin - 1 and width = xmax - xmin + 1 (`hemoco.data.sources.voc`), hence x + width = xmax, and what two boxes share
by VOC's count, min(xmax) - max(xmin) + 1, is min(x + width) - max(x). So plain IoU of boxes of COCO's form is the IoU
of VOC, and nothing is added here. A detector trained on such boxes predicts such boxes.

detectron2's evaluator adds 1 to xmin and ymin of such predictions and then to every width, which is the same IoU. Its
AP50 in percent is our box_ap50 for VOC 2012 and our box_ap50_11point for VOC 2007, except where it rounds (scores to
three decimals, which makes ties, and corners to one), where an IoU equals the threshold (it takes that as missed, the
kit as found) and where recall equals one of the eleven levels (it may miss that by the last bit). So it is for its AP
and AP75. What is published of VOC 2007, MoCo's tables among it, are its eleven points.

Written here for want of a maintained package: the metrics of globox and hotcoco have no difficult objects, and
mean-average-precision (last release January 2024) has no fixed order among equal scores.

Shapes: T = 10 IoU thresholds, D detections of a category by falling score, G objects of it as annotated.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hemoco.errors import ShardError
from hemoco.transfer.detection.coco_metric import check_scenes, metric_names

Floats = NDArray[np.float64]

_THRESHOLDS = np.arange(50, 100, 5) / 100
_RECALLS = np.arange(11) / 10


class _Matches(NamedTuple):
    """The object that each detection of a category overlaps most."""

    iou: Floats
    """(D,); 0 where the image has no such object."""
    best: NDArray[np.int64]
    """(D,), its row among the objects."""
    difficult: NDArray[np.bool_]
    """(G,)."""


def voc_metrics(
    ground_truth: dict[str, Any], predictions: list[dict[str, Any]]
) -> dict[str, float]:
    """VOC's average precision of boxes, mean over the categories with an object that is not difficult.

    Args:
        ground_truth: as in a COCO instances file; annotations may have `difficult`, else they are not.
        predictions: COCO results; of equal scores, those that come first count first.

    Returns:
        box_ap50 and box_ap75, the areas under the interpolated curves (VOC 2010 and later); box_ap, their mean over IoU
        0.50 to 0.95; each again with `_11point`, the mean of the curve at recall 0, 0.1 to 1 (VOC 2007); box_ap50/NAME
        by category, with names from `coco.metric_names`. Each is in [0, 1].

    Raises:
        ShardError: see `coco.check_scenes`, or all objects are difficult.
    """
    check_scenes(ground_truth, predictions)
    annotations = ground_truth["annotations"]
    object_rows, found_rows = (
        _rows_by("category_id", annotations),
        _rows_by("category_id", predictions),
    )
    areas: dict[str, list[float]] = {}
    eleven_points: list[list[float]] = []
    for category_id, name in metric_names(ground_truth["categories"]).items():
        objects = [annotations[row] for row in object_rows.get(category_id, [])]
        matches = _match(objects, [predictions[row] for row in found_rows.get(category_id, [])])
        if matches.difficult.all():
            continue
        curves = [_curve(matches, threshold) for threshold in _THRESHOLDS]
        areas[name] = [_area(recall, precision) for recall, precision in curves]
        eleven_points.append([_eleven_points(recall, precision) for recall, precision in curves])
    if not areas:
        raise ShardError(
            f"all objects of {len(ground_truth['images'])} images are difficult: evaluate on some others"
        )
    metrics: dict[str, float] = {}
    for kind, values in (("", list(areas.values())), ("_11point", eleven_points)):
        means = np.mean(values, axis=0)  # (T,)
        metrics |= {
            f"box_ap{kind}": means.mean(),
            f"box_ap50{kind}": means[0],
            f"box_ap75{kind}": means[5],
        }
    metrics |= {f"box_ap50/{name}": of_category[0] for name, of_category in areas.items()}
    return {name: float(value) for name, value in metrics.items()}


def _match(objects: list[dict[str, Any]], found: list[dict[str, Any]]) -> _Matches:
    """Compares the detections of a category with its objects, image by image; independent of the threshold."""
    found = sorted(found, key=lambda item: -float(item["score"]))  # stable
    iou, best = np.zeros(len(found)), np.zeros(len(found), np.int64)
    rows, detections = _rows_by("image_id", objects), _rows_by("image_id", found)
    for image_id in rows.keys() & detections.keys():
        these, those = detections[image_id], rows[image_id]
        ious = _ious(_boxes(found, these), _boxes(objects, those))
        iou[these] = ious.max(axis=1)
        best[these] = np.array(those)[ious.argmax(axis=1)]
    difficult = np.array([bool(item.get("difficult") or item["iscrowd"]) for item in objects], bool)
    return _Matches(iou, best, difficult)


def _rows_by(field: str, items: list[dict[str, Any]]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, item in enumerate(items):
        rows.setdefault(item[field], []).append(row)
    return rows


def _boxes(items: list[dict[str, Any]], rows: list[int]) -> Floats:
    return np.array([items[row]["bbox"] for row in rows], np.float64)


def _ious(first: Floats, second: Floats) -> Floats:
    """IoU (N, M) of boxes (N, 4) and (M, 4) as x, y, width, height; 0 for boxes without area."""
    corners, other_corners = first[:, None, :2], second[None, :, :2]  # (N, 1, 2), (1, M, 2)
    ends, other_ends = corners + first[:, None, 2:], other_corners + second[None, :, 2:]
    sides = np.minimum(ends, other_ends) - np.maximum(corners, other_corners)  # (N, M, 2)
    shared = sides.clip(min=0).prod(axis=2)
    union = first[:, None, 2:].prod(axis=2) + second[None, :, 2:].prod(axis=2) - shared
    ious: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
    return ious


def _curve(matches: _Matches, threshold: float) -> tuple[Floats, Floats]:
    """Recall and precision (D,) after each detection, at an IoU threshold."""
    hit = matches.iou >= threshold
    counted = np.flatnonzero(hit & ~matches.difficult[matches.best])
    true = np.zeros(len(hit), bool)
    true[counted[np.unique(matches.best[counted], return_index=True)[1]]] = (
        True  # the first of each object
    )
    false = ~hit
    false[counted] = ~true[counted]
    true_so_far, false_so_far = true.cumsum(), false.cumsum()
    # a difficult object can be found before anything counts
    precision = true_so_far / np.maximum(true_so_far + false_so_far, 1)
    return true_so_far / (~matches.difficult).sum(), precision


def _area(recall: Floats, precision: Floats) -> float:
    """Under the curve with precision at each recall replaced by the highest at that or a higher one."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def _eleven_points(recall: Floats, precision: Floats) -> float:
    """Mean of the highest precision at each of eleven recalls or higher."""
    return float(np.mean([precision[recall >= level].max(initial=0.0) for level in _RECALLS]))
