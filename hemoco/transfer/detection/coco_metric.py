"""COCO average precision of boxes and masks (Lin et al. 2014), computed by faster-coco-eval.

Predictions are COCO results: `image_id`, `category_id`, `score`, `bbox` (x, y, width, height) and,
for masks, `segmentation`. Masks stay compressed RLE throughout: the dense masks of an image's 100
detections would take 100 bytes per pixel.

Shapes: T = 10 IoU thresholds from 0.50 to 0.95, R = 101 levels of recall, K categories, A = 4
ranges of area.
"""

import contextlib
import gc
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from numpy.typing import NDArray

from hemoco.errors import ShardError

_AREAS = ("small", "medium", "large")  # the evaluator's order; index 0 is all areas together
_UNSAFE = re.compile(r"[^\w.\- ]")
_NAME_LENGTH = 100  # characters; MLflow allows 250 for a whole metric key

Segmentation = dict[str, Any] | list[list[float]]
"""A COCO segmentation: compressed or uncompressed RLE, or polygons."""


class _Curves(NamedTuple):
    """The evaluator's curves; -1 where there is no object."""

    precision: NDArray[np.float64]
    """(T, R, K, A), categories in ascending order of id."""
    recall: NDArray[np.float64]
    """(T, K, A)."""


def coco_metrics(
    ground_truth: dict[str, Any],
    predictions: list[dict[str, Any]],
    *,
    masks: bool,
    max_detections: int,
) -> dict[str, float]:
    """Computes COCO's average precisions, each the mean over the categories that occur.

    Areas and categories without objects (crowds excepted) are undefined and left out. Small, medium
    and large are COCO's (up to 32², up to 96² and more pixels) by the `area` of the annotation.
    Predictions are classified by the area of the box or mask that is evaluated, as in detectron2;
    pycocotools takes the area of the box whenever there is one.

    Args:
        ground_truth: `images`, `annotations` and `categories` as in a COCO instances file.
        predictions: COCO results; a category that occurs and is never predicted scores 0.
        masks: evaluate masks as well as boxes.
        max_detections: number of best-scored predictions that count, per image and category.

    Returns:
        box_ap (IoU 0.50 to 0.95), box_ap50, box_ap75, box_ap_small, box_ap_medium, box_ap_large,
        box_ar (the recall with `max_detections`, mean over the same IoUs) and box_ap/NAME for each
        category, with names from `metric_names`; if `masks`, also mask_ap and so on. All are in
        [0, 1].

    Raises:
        ShardError: see `check_scenes`.
    """
    check_scenes(ground_truth, predictions)
    names = metric_names(ground_truth["categories"])
    with _no_collection():
        truth, results = _index(ground_truth, predictions)
        metrics = _summary("box", _evaluate(truth, results, "bbox", max_detections), names)
        if masks:
            _add_masks(truth, ground_truth["annotations"])
            _add_masks(results, predictions)
            _measure_masks(results)
            metrics |= _summary("mask", _evaluate(truth, results, "segm", max_detections), names)
    return metrics


def check_scenes(ground_truth: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
    """Checks that ids are unique, that all references to them exist, and that there is an object.

    Evaluators ignore such errors silently: of two images with one id only the last counts, and
    predictions of unknown categories vanish. The ids of annotations are not checked, since the
    evaluation numbers its copies anew.

    Raises:
        ShardError: two images or two categories have the same id, an annotation or prediction
            refers to an unknown id, or there is no object.
    """
    for kind, field in (("images", "image_id"), ("categories", "category_id")):
        counts = Counter(item["id"] for item in ground_truth[kind])
        duplicates = sorted(number for number, count in counts.items() if count > 1)
        if duplicates:
            raise ShardError(
                f"the ground truth's {kind} have the ids {duplicates[:5]} more than once: give "
                "each an id of its own"
            )
        references = {"annotations": ground_truth["annotations"], "predictions": predictions}
        for what, items in references.items():
            unknown = sorted({item[field] for item in items} - counts.keys())
            if unknown:
                raise ShardError(
                    f"{what} have {field} {unknown[:5]}: allowed are the ids of the ground "
                    f"truth's {kind}"
                )
    if all(item["iscrowd"] for item in ground_truth["annotations"]):
        raise ShardError(
            f"none of the {len(ground_truth['images'])} images has an object: evaluate on a split "
            "with objects"
        )


def metric_names(categories: Iterable[dict[str, Any]]) -> dict[int, str]:
    """Names of the categories, unique and valid as the last part of an MLflow metric key.

    Letters, digits, `_`, `-`, `.` and spaces stay; every other character becomes `_`. Where two
    names are then equal, the lowest id keeps the name and the others get their id appended.

    Returns:
        Names by id, in ascending order of id.
    """
    names: dict[int, str] = {}
    for category in sorted(categories, key=lambda category: int(category["id"])):
        name = _UNSAFE.sub("_", str(category["name"]))[:_NAME_LENGTH]
        if not name.strip("."):  # MLflow stores keys as paths, in which dots alone are folders
            name = str(category["id"])
        while name in names.values():
            name += f"_{category['id']}"
        names[category["id"]] = name
    return names


def ground_truth_of(
    images: Iterable[tuple[int, int, int, list[dict[str, Any]]]],
    categories: Iterable[dict[str, Any]],
) -> dict[str, Any]:
    """Builds the content of a COCO instances file.

    Args:
        images: image id, height, width and COCO annotations of each image; the annotations get new
            ids.
        categories: COCO categories.
    """
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, height, width, objects in images:
        listed.append({"id": image_id, "height": height, "width": width})
        for item in objects:
            # From 1, since COCO's evaluators use id 0 for a prediction without a match.
            annotations.append(item | {"id": len(annotations) + 1, "image_id": image_id})
    return {"images": listed, "annotations": annotations, "categories": list(categories)}


def decode_mask(segmentation: Segmentation, height: int, width: int) -> NDArray[np.uint8]:
    """Decodes a segmentation to a mask (H, W) of zeros and ones.

    Raises:
        ShardError: a polygon has fewer than three points.
    """
    decoded: NDArray[np.uint8] = rle.decode(_compress(segmentation, height, width))
    return decoded


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encodes a mask (H, W) as compressed RLE that JSON can hold."""
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in mask.shape], "counts": encoded["counts"].decode()}


def _compress(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Converts a segmentation to compressed RLE, whose counts are str or bytes."""
    compressed: dict[str, Any]
    if isinstance(segmentation, list):
        shortest = min(map(len, segmentation))
        if shortest < 6:  # the encoder reads four numbers as a box
            raise ShardError(
                f"a polygon has {shortest} numbers: it needs three points or more, so remove it"
            )
        compressed = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        compressed = rle.frPyObjects(segmentation, height, width)
    else:
        compressed = segmentation
    return compressed


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disables garbage collection in the block.

    The evaluator creates hundreds of thousands of objects but no reference cycles; searching for
    cycles takes a fourth of its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _index(ground_truth: dict[str, Any], predictions: list[dict[str, Any]]) -> tuple[COCO, COCO]:
    """Indexes ground truth and predictions, without masks, for the evaluator.

    They are copies, since the evaluator writes into the annotations.
    """
    annotations = ground_truth["annotations"]
    truth = [_copy(item, index, "area", "iscrowd") for index, item in enumerate(annotations)]
    results = [_copy(item, index, "score") for index, item in enumerate(predictions)]
    for result in results:
        result["area"] = result["bbox"][2] * result["bbox"][3]
        result["iscrowd"] = 0
    images = [
        {"id": image["id"], "height": image["height"], "width": image["width"]}
        for image in ground_truth["images"]
    ]
    categories = [{"id": category["id"]} for category in ground_truth["categories"]]
    scenes = {"images": images, "categories": categories}
    return COCO(scenes | {"annotations": truth}), COCO(scenes | {"annotations": results})


def _copy(item: dict[str, Any], index: int, *fields: str) -> dict[str, Any]:
    """A copy of an annotation or prediction with these fields and those that both have."""
    copy: dict[str, Any] = {"id": index + 1}  # the evaluator uses 0 for "no match"
    for field in ("image_id", "category_id", "bbox", *fields):
        copy[field] = item[field]
    return copy


def _add_masks(indexed: COCO, items: list[dict[str, Any]]) -> None:
    """Adds the masks of `items` to their indexed copies."""
    for copy, item in zip(indexed.dataset["annotations"], items, strict=True):
        image = indexed.imgs[item["image_id"]]
        copy["segmentation"] = _compress(item["segmentation"], image["height"], image["width"])


def _measure_masks(results: COCO) -> None:
    """Replaces the predictions' areas of boxes with the areas of their masks."""
    copies = results.dataset["annotations"]
    areas = rle.area([copy["segmentation"] for copy in copies])
    for copy, area in zip(copies, areas, strict=True):
        copy["area"] = area


def _evaluate(
    truth: COCO, results: COCO, kind: Literal["bbox", "segm"], max_detections: int
) -> _Curves:
    # By default the evaluator prints its progress.
    evaluation = COCOeval_faster(truth, results, kind, print_function=lambda line: None)
    evaluation.params.maxDets = [max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    # the last dimension is maxDets, which has one value
    return _Curves(evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0])


def _summary(prefix: str, curves: _Curves, names: dict[int, str]) -> dict[str, float]:
    """The metrics of the curves: means over all values that are defined."""
    precision = curves.precision[..., 0]  # all areas: (T, R, K)
    parts = {
        "ap": precision,
        "ap50": precision[0],
        "ap75": precision[5],
        "ar": curves.recall[..., 0],
    }
    for index, area in enumerate(_AREAS, 1):
        parts[f"ap_{area}"] = curves.precision[..., index]
    for index, name in enumerate(names.values()):
        parts[f"ap/{name}"] = precision[..., index]
    metrics = {}
    for name, values in parts.items():
        defined = values[values > -1]
        if defined.size:
            metrics[f"{prefix}_{name}"] = float(defined.mean())
    return metrics
