"""Average precision as in the Pascal VOC development kit (Everingham et al. 2010, section 4.2).

The detections of a category, over all images, are taken in descending order of score. Each is
compared with the object of its image and category that it overlaps most. If the IoU is below the
threshold, it is a false positive. Otherwise it is a true positive the first time the object is
matched and a false positive every further time; if the object is difficult, the detection does not
count at all. The number of detections is not limited. Crowds, which VOC does not have, count as
difficult.

VOC's boxes include both corner pixels, so its kit adds 1 to every width. COCO's boxes include that
1 already: x = xmin - 1 and width = xmax - xmin + 1 (`hemoco.data.sources.voc`). Hence x + width =
xmax, and the overlap by VOC's rule, min(xmax) - max(xmin) + 1, equals min(x + width) - max(x): the
plain IoU of COCO boxes is VOC's IoU, and nothing is added here. A detector trained on such boxes
predicts such boxes.

detectron2's evaluator adds 1 to xmin and ymin of such predictions and then to every width, which
gives the same IoU. Its AP50 in percent is our box_ap50 for VOC 2012 and our box_ap50_11point for
VOC 2007; its AP and AP75 correspond in the same way. Exceptions: it rounds scores to three decimals
(which creates ties) and corners to one; it counts an IoU equal to the threshold as a miss, the kit
as a match; and it may miss a recall equal to one of the eleven levels by the last bit. Published
results on VOC 2007, including MoCo's tables, use the eleven points.

It is implemented here because no maintained package does it: the metrics of globox and hotcoco have
no difficult objects, and mean-average-precision (last release January 2024) has no fixed order
among equal scores.

Shapes: T = 10 IoU thresholds, D detections of a category in descending order of score, G objects of
the category.
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
    """IoU with that object (D,); 0 where the image has no object of the category."""
    best: NDArray[np.int64]
    """Index of that object (D,)."""
    difficult: NDArray[np.bool_]
    """True for objects that do not count (G,)."""


def voc_metrics(
    ground_truth: dict[str, Any], predictions: list[dict[str, Any]]
) -> dict[str, float]:
    """Computes VOC's average precisions of boxes, each the mean over categories.

    Categories whose objects are all difficult, or that have none, are left out.

    Args:
        ground_truth: content of a COCO instances file; an annotation may have `difficult`, which
            is 0 by default.
        predictions: COCO results; predictions with equal scores are taken in the given order.

    Returns:
        box_ap50 and box_ap75, the areas under the interpolated curves (VOC 2010 and later); box_ap,
        the mean over IoU 0.50 to 0.95; the same three with `_11point`, the mean of the curve at
        recall 0, 0.1 to 1 (VOC 2007); box_ap50/NAME for each category, with names from
        `coco_metric.metric_names`. All are in [0, 1].

    Raises:
        ShardError: see `coco_metric.check_scenes`, or all objects are difficult.
    """
    check_scenes(ground_truth, predictions)
    objects_by_category = _by_category(ground_truth["annotations"])
    detections_by_category = _by_category(predictions)
    areas: dict[str, list[float]] = {}
    eleven_points: list[list[float]] = []
    for category_id, name in metric_names(ground_truth["categories"]).items():
        objects = objects_by_category.get(category_id, [])
        matches = _match(objects, detections_by_category.get(category_id, []))
        if matches.difficult.all():
            continue
        curves = [_curve(matches, threshold) for threshold in _THRESHOLDS]
        areas[name] = [_area(recall, precision) for recall, precision in curves]
        eleven_points.append([_eleven_points(recall, precision) for recall, precision in curves])
    if not areas:
        raise ShardError(
            f"all objects of {len(ground_truth['images'])} images are difficult: evaluate on a "
            "split with others"
        )
    metrics: dict[str, float] = {}
    for suffix, values in (("", list(areas.values())), ("_11point", eleven_points)):
        means = np.mean(values, axis=0)  # (T,)
        metrics[f"box_ap{suffix}"] = means.mean()
        metrics[f"box_ap50{suffix}"] = means[0]
        metrics[f"box_ap75{suffix}"] = means[5]
    for name, area_by_threshold in areas.items():
        metrics[f"box_ap50/{name}"] = area_by_threshold[0]
    return {name: float(value) for name, value in metrics.items()}


def _by_category(items: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for item in items:
        groups.setdefault(item["category_id"], []).append(item)
    return groups


def _match(objects: list[dict[str, Any]], detections: list[dict[str, Any]]) -> _Matches:
    """Compares the detections of a category with its objects, image by image."""
    detections = sorted(detections, key=lambda item: -float(item["score"]))  # stable
    iou, best = np.zeros(len(detections)), np.zeros(len(detections), np.int64)
    object_rows = _rows_by_image(objects)
    detection_rows = _rows_by_image(detections)
    for image_id in object_rows.keys() & detection_rows.keys():
        rows, candidates = detection_rows[image_id], object_rows[image_id]
        ious = _ious(_boxes(detections, rows), _boxes(objects, candidates))
        iou[rows] = ious.max(axis=1)
        best[rows] = np.array(candidates)[ious.argmax(axis=1)]
    difficult = np.array([bool(item.get("difficult") or item["iscrowd"]) for item in objects], bool)
    return _Matches(iou, best, difficult)


def _rows_by_image(items: list[dict[str, Any]]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, item in enumerate(items):
        rows.setdefault(item["image_id"], []).append(row)
    return rows


def _boxes(items: list[dict[str, Any]], rows: list[int]) -> Floats:
    return np.array([items[row]["bbox"] for row in rows], np.float64)


def _ious(first: Floats, second: Floats) -> Floats:
    """IoUs (N, M) of boxes (N, 4) and (M, 4) as x, y, width, height; 0 for boxes without area."""
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
    counted = np.flatnonzero(hit & ~matches.difficult[matches.best])  # rows of hits that count
    # np.unique returns the first row of each object, hence its detection with the highest score
    _, firsts = np.unique(matches.best[counted], return_index=True)
    true_positive = np.zeros(len(hit), bool)
    true_positive[counted[firsts]] = True
    false_positive = ~hit
    false_positive[counted] = ~true_positive[counted]
    true_so_far, false_so_far = true_positive.cumsum(), false_positive.cumsum()
    # the maximum avoids 0 / 0 while only detections of difficult objects have come
    precision = true_so_far / np.maximum(true_so_far + false_so_far, 1)
    return true_so_far / (~matches.difficult).sum(), precision


def _area(recall: Floats, precision: Floats) -> float:
    """The area under the interpolated curve.

    The interpolated precision at a recall is the highest precision at that recall or a higher one.
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def _eleven_points(recall: Floats, precision: Floats) -> float:
    """The mean of the interpolated precision at recall 0, 0.1, ..., 1."""
    return float(np.mean([precision[recall >= level].max(initial=0.0) for level in _RECALLS]))
