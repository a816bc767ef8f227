"""COCO average precision of boxes and masks, computed by pycocotools.

Predictions are COCO results: `image_id`, `category_id`, `bbox` (x, y, width, height), `score` and `segmentation` as
compressed RLE. Dense masks are never kept: an image's 100 of them take as much memory as the image a hundred times.
"""

import contextlib
import io
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

_METRICS = ("box_ap", "box_ap50", "mask_ap", "mask_ap50", "mask_ap75")


def mask_ap(ground_truth: dict[str, Any], predictions: list[dict[str, Any]], max_detections: int) -> dict[str, float]:
    """Average precision over IoU 0.50 to 0.95 and at 0.50 and 0.75, mean over the categories that occur.

    Args:
        ground_truth: `images`, `annotations` and `categories` as in a COCO instances file.
        predictions: COCO results; empty scores 0.
        max_detections: best-scored predictions of each image and category that count.

    Returns:
        box_ap, box_ap50, mask_ap, mask_ap50, mask_ap75, each in [0, 1].
    """
    if not predictions:
        return dict.fromkeys(_METRICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by printing
        truth = COCO()
        # copies, for pycocotools writes into annotations and results
        truth.dataset = ground_truth | {"annotations": [dict(item) for item in ground_truth["annotations"]]}
        truth.createIndex()
        found = truth.loadRes([dict(item) for item in predictions])
        box = _precisions(truth, found, "bbox", max_detections)
        mask = _precisions(truth, found, "segm", max_detections)
    values = (_mean(box), _mean(box[:1]), _mean(mask), _mean(mask[:1]), _mean(mask[5:6]))
    return dict(zip(_METRICS, values, strict=True))


def ground_truth_of(
    images: Iterable[tuple[int, int, int, list[dict[str, Any]]]], categories: Iterable[dict[str, Any]]
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
            # pycocotools takes an annotation of id 0 for unmatched
            annotations.append(item | {"id": len(annotations) + 1, "image_id": image_id})
    return {"images": listed, "annotations": annotations, "categories": list(categories)}


def decode_mask(segmentation: dict[str, Any] | list[list[float]], height: int, width: int) -> NDArray[np.uint8]:
    """A mask (H, W) of zeros and ones from COCO's polygons, uncompressed or compressed RLE."""
    if isinstance(segmentation, list):
        encoded = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = rle.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools' own use of numpy
        decoded: NDArray[np.uint8] = rle.decode(encoded)
    return decoded


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Compressed RLE of a mask (H, W), fit for JSON."""
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in mask.shape], "counts": encoded["counts"].decode()}


def _precisions(truth: COCO, found: COCO, kind: str, max_detections: int) -> NDArray[np.float64]:
    """Precision by IoU threshold, recall and category (10, 101, categories); -1 where a category does not occur."""
    evaluation = COCOeval(truth, found, kind)
    evaluation.params.maxDets = [max_detections]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    precisions: NDArray[np.float64] = evaluation.eval["precision"][:, :, :, 0, -1]
    return precisions


def _mean(precisions: NDArray[np.float64]) -> float:
    known = precisions[precisions > -1]
    return float(known.mean()) if known.size else 0.0
