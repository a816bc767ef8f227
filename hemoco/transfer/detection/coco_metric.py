"""COCO average precision of boxes and masks (Lin et al. 2014), computed by faster-coco-eval.

Predictions are COCO results: `image_id`, `category_id`, `score`, `bbox` (x, y, width, height) and, where masks count,
`segmentation`. Masks are compressed RLE throughout; dense ones are never kept, for an image's 100 of them take as much
memory as the image a hundred times.

Shapes: T = 10 IoU thresholds from 0.50 to 0.95, R = 101 levels of recall, K categories, A = 4 ranges of area.
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

_AREAS = ("small", "medium", "large")  # as the evaluator has them, after all areas together
_UNSAFE = re.compile(r"[^\w.\- ]")
_NAME_LENGTH = 100  # characters; MLflow takes 250 for a whole key

Segmentation = dict[str, Any] | list[list[float]]
"""COCO's polygons, uncompressed or compressed RLE."""


class _Curves(NamedTuple):
    """What was measured, -1 where there is no object."""

    precision: NDArray[np.float64]
    """(T, R, K, A), categories by rising id."""
    recall: NDArray[np.float64]
    """(T, K, A)."""


def coco_metrics(
    ground_truth: dict[str, Any],
    predictions: list[dict[str, Any]],
    *,
    masks: bool,
    max_detections: int,
) -> dict[str, float]:
    """The family of COCO's average precisions, each the mean over the categories that occur.

    Areas and categories without an object that is no crowd are left out: no value would be true of them. Small, medium
    and large are COCO's (up to 32², up to 96² and more pixels) by the annotations' `area`; predictions go by the area
    of the box or mask that is evaluated, as in detectron2, where pycocotools takes that of the box if there is one.

    Args:
        ground_truth: `images`, `annotations` and `categories` as in a COCO instances file.
        predictions: COCO results; what occurs and is not predicted scores 0.
        masks: whether to evaluate masks beside boxes.
        max_detections: best-scored predictions of each image and category that count.

    Returns:
        box_ap (IoU 0.50 to 0.95), box_ap50, box_ap75, box_ap_small, box_ap_medium, box_ap_large, box_ar (the recall
        that max_detections reach, mean over the same IoUs) and box_ap/NAME by category, with names from
        `metric_names`; with masks, mask_ap and so on. Each is in [0, 1].

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
    """That each object and each prediction has one image and one category, and that there is something to find.

    Evaluators pass over such errors in silence: of two images with one id the last counts, predictions of unknown
    categories vanish. Ids of annotations are not looked at: they play no part, and evaluation numbers its copies anew.

    Raises:
        ShardError: an id of an image or category comes twice, an annotation or prediction has an id that is not there,
            or there is no object.
    """
    for kind, field in (("images", "image_id"), ("categories", "category_id")):
        counts = Counter(item["id"] for item in ground_truth[kind])
        twice = sorted(number for number, count in counts.items() if count > 1)
        if twice:
            raise ShardError(
                f"the ground truth's {kind} have the ids {twice[:5]} more than once: number them anew"
            )
        for what, items in (
            ("annotations", ground_truth["annotations"]),
            ("predictions", predictions),
        ):
            unknown = sorted({item[field] for item in items} - counts.keys())
            if unknown:
                raise ShardError(
                    f"{what} have {field} {unknown[:5]}: allowed are the ids of the ground truth's {kind}"
                )
    if all(item["iscrowd"] for item in ground_truth["annotations"]):
        raise ShardError(
            f"none of the {len(ground_truth['images'])} images has an object: evaluate on some that have"
        )


def metric_names(categories: Iterable[dict[str, Any]]) -> dict[int, str]:
    """Names of the categories by rising id, each fit for the last part of an MLflow metric key, no two alike.

    Letters, digits, `_`, `-`, `.` and space stay, all else becomes `_`. Of names that are alike then, that of the
    lowest id stays and the others get their id at the end.
    """
    names: dict[int, str] = {}
    for category in sorted(categories, key=lambda category: int(category["id"])):
        name = _UNSAFE.sub("_", str(category["name"]))[:_NAME_LENGTH]
        if not name.strip("."):  # in a path they mean folders
            name = str(category["id"])
        while name in names.values():
            name += f"_{category['id']}"
        names[category["id"]] = name
    return names


def ground_truth_of(
    images: Iterable[tuple[int, int, int, list[dict[str, Any]]]],
    categories: Iterable[dict[str, Any]],
) -> dict[str, Any]:
    """A COCO instances file's content.

    Args:
        images: image id, height, width and COCO annotations of each; annotation ids are given anew.
        categories: COCO categories.
    """
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, height, width, objects in images:
        listed.append({"id": image_id, "height": height, "width": width})
        for item in objects:
            # COCO's evaluators take an annotation of id 0 for unmatched
            annotations.append(item | {"id": len(annotations) + 1, "image_id": image_id})
    return {"images": listed, "annotations": annotations, "categories": list(categories)}


def decode_mask(segmentation: Segmentation, height: int, width: int) -> NDArray[np.uint8]:
    """A mask (H, W) of zeros and ones.

    Raises:
        ShardError: a polygon has less than three points.
    """
    decoded: NDArray[np.uint8] = rle.decode(_compress(segmentation, height, width))
    return decoded


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Compressed RLE of a mask (H, W), fit for JSON."""
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in mask.shape], "counts": encoded["counts"].decode()}


def _compress(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Compressed RLE, its counts str or bytes."""
    compressed: dict[str, Any]
    if isinstance(segmentation, list):
        shortest = min(map(len, segmentation))
        if shortest < 6:  # the encoder would take four numbers for a box
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
    """The evaluator makes objects by the 100,000 and no cycles; to look for some would take a fourth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _index(ground_truth: dict[str, Any], predictions: list[dict[str, Any]]) -> tuple[COCO, COCO]:
    """Ground truth and predictions without masks, in copies, for the evaluator writes into them."""
    objects, found = (
        _copies(ground_truth["annotations"], ("area", "iscrowd")),
        _copies(predictions, ("score",)),
    )
    for copy in found:
        copy.update(area=copy["bbox"][2] * copy["bbox"][3], iscrowd=0)
    scenes = {
        "images": [
            {key: image[key] for key in ("id", "height", "width")}
            for image in ground_truth["images"]
        ],
        "categories": [{"id": category["id"]} for category in ground_truth["categories"]],
    }
    return COCO(scenes | {"annotations": objects}), COCO(scenes | {"annotations": found})


def _copies(items: list[dict[str, Any]], fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Numbered from 1: the evaluator takes 0 for unmatched."""
    fields = ("image_id", "category_id", "bbox", *fields)
    return [
        {"id": number} | {field: item[field] for field in fields}
        for number, item in enumerate(items, 1)
    ]


def _add_masks(indexed: COCO, items: list[dict[str, Any]]) -> None:
    """Gives the copies of items their masks."""
    for copy, item in zip(indexed.dataset["annotations"], items, strict=True):
        image = indexed.imgs[item["image_id"]]
        copy["segmentation"] = _compress(item["segmentation"], image["height"], image["width"])


def _measure_masks(results: COCO) -> None:
    """Replaces the areas of boxes by those of masks."""
    copies = results.dataset["annotations"]
    for copy, area in zip(copies, rle.area([copy["segmentation"] for copy in copies]), strict=True):
        copy["area"] = area


def _evaluate(
    truth: COCO, results: COCO, kind: Literal["bbox", "segm"], max_detections: int
) -> _Curves:
    evaluation = COCOeval_faster(truth, results, kind, print_function=_say_nothing)
    evaluation.params.maxDets = [max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    return _Curves(evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0])


def _say_nothing(line: str) -> None:
    """For the evaluator's report of its progress: numbers go to MLflow, not to the log."""


def _summary(prefix: str, curves: _Curves, names: dict[int, str]) -> dict[str, float]:
    """Means over what occurs, by metric."""
    of_all = curves.precision[..., 0]  # (T, R, K)
    values = {"ap": of_all, "ap50": of_all[0], "ap75": of_all[5], "ar": curves.recall[..., 0]}
    values |= {f"ap_{area}": curves.precision[..., place] for place, area in enumerate(_AREAS, 1)}
    values |= {f"ap/{name}": of_all[..., place] for place, name in enumerate(names.values())}
    known = {name: value[value > -1] for name, value in values.items()}
    return {f"{prefix}_{name}": float(value.mean()) for name, value in known.items() if value.size}
