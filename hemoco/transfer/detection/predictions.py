"""Predictions of a detector as COCO results, metrics and a picture.

Shapes: images are H x W pixels with D detections.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes

from hemoco.config import DetectionConfig, MaskRcnnConfig
from hemoco.distributed import rank, world_size
from hemoco.transfer.detection.coco_metric import coco_metrics, encode_mask, ground_truth_of
from hemoco.transfer.detection.data import DetectionSample
from hemoco.transfer.detection.detector import autocast
from hemoco.transfer.detection.drawing import draw_scenes
from hemoco.transfer.detection.voc_metric import voc_metrics
from hemoco.transfer.result import TransferResult

_SCENES_DRAWN = 4
_BOX_METRICS = {"coco": "box_ap", "voc": "box_ap50", "voc07": "box_ap50_11point"}
_MASKS_AT_ONCE = 16  # dense masks of the image's size; all of a crowded image take gigabytes


@torch.no_grad()
def predict(
    model: GeneralizedRCNN,
    samples: Sequence[DetectionSample],
    category_ids: Sequence[int],
    config: DetectionConfig,
) -> list[dict[str, Any]]:
    """Predicts this rank's share of the images; gather the results of all ranks.

    The share is every world_size-th image of the split. Each image is evaluated alone: in a batch
    it would be padded to the largest image, which changes its predictions.

    Args:
        model: left in evaluation mode.
        samples: all samples of the split.
        category_ids: ids of all categories, in order.
        config: for the precision.

    Returns:
        COCO results.
    """
    device = next(model.parameters()).device
    model.eval()
    results: list[dict[str, Any]] = []
    for sample in samples:
        if (sample.image_id - 1) % world_size() == rank():
            with autocast(config, device):
                detections = detect(model, sample.decode().to(device).float() / 255)
            results.extend(_coco_results(sample, detections, category_ids))
    return results


def measure(
    config: DetectionConfig,
    samples: Sequence[DetectionSample],
    predictions: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
) -> TransferResult:
    """Computes the average precision from the predictions of all ranks.

    The result also has a picture of a few images and the file `predictions.json` (see
    `_results_file` for its image ids). The metric `images_over_max_detections` counts images with
    more objects than `config.max_detections`, which therefore cannot all be found.

    Args:
        config: the metric and its number of detections.
        samples: all samples of the split.
        predictions: COCO results of all ranks, in any order.
        categories: COCO categories.
    """
    masks = isinstance(config, MaskRcnnConfig)
    truth = ground_truth_of(
        ((s.image_id, s.height, s.width, s.annotations) for s in samples), categories
    )
    # Sorted, so that the result does not depend on the number of ranks.
    predictions = sorted(predictions, key=lambda item: int(item["image_id"]))
    if config.metric == "coco":
        metrics = coco_metrics(
            truth, predictions, masks=masks, max_detections=config.max_detections
        )
    else:
        metrics = voc_metrics(truth, predictions)
    over_max_detections = 0
    for sample in samples:
        objects = sum(not item["iscrowd"] for item in sample.annotations)
        over_max_detections += objects > config.max_detections
    metric = headline_metric(config)
    return TransferResult(
        metric=metric,
        value=metrics[metric],
        metrics=metrics | {"images_over_max_detections": float(over_max_detections)},
        images={"detections": _draw(samples[:_SCENES_DRAWN], predictions, categories)},
        files={"predictions.json": _results_file(samples, predictions)},
    )


def headline_metric(config: DetectionConfig) -> str:
    """The name of the metric by which detectors are compared."""
    return "mask_ap" if isinstance(config, MaskRcnnConfig) else _BOX_METRICS[config.metric]


def detect(model: GeneralizedRCNN, image: Tensor) -> dict[str, Tensor]:
    """Runs torchvision's detector on an image (3, H, W) in [0, 1].

    These are the steps of `GeneralizedRCNN.forward` without its last: that would paste all masks
    into the image at once, D * H * W floats.

    Returns:
        boxes (D, 4) as x0, y0, x1, y1 in the image, labels (D,), scores (D,) and, from Mask R-CNN,
        masks (D, 1, 28, 28) relative to the boxes.
    """
    scaled, _ = model.transform([image])
    features = model.backbone(scaled.tensors)
    proposals, _ = model.rpn(scaled, features)
    (in_scaled_image,), _ = model.roi_heads(features, proposals, scaled.image_sizes)
    detections: dict[str, Tensor] = dict(in_scaled_image)
    detections["boxes"] = resize_boxes(detections["boxes"], scaled.image_sizes[0], image.shape[-2:])
    return detections


def _coco_results(
    sample: DetectionSample, detections: dict[str, Tensor], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Converts the output of `detect` to COCO results."""
    boxes = detections["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]  # corners to width and height
    labels, scores = detections["labels"].tolist(), detections["scores"].tolist()
    results: list[dict[str, Any]] = []
    for box, label, score in zip(boxes.tolist(), labels, scores, strict=True):
        category_id = category_ids[label - 1]  # label 0 is the background
        results.append(
            {"image_id": sample.image_id, "category_id": category_id, "bbox": box, "score": score}
        )
    if "masks" in detections:
        for first in range(0, len(results), _MASKS_AT_ONCE):
            part = slice(first, first + _MASKS_AT_ONCE)
            pasted = paste_masks_in_image(
                detections["masks"][part], detections["boxes"][part], (sample.height, sample.width)
            )  # (part of D, 1, H, W)
            for result, mask in zip(results[part], pasted, strict=True):
                result["segmentation"] = encode_mask((mask[0] > 0.5).cpu().numpy())
    return results


def _draw(
    samples: Sequence[DetectionSample],
    predictions: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
) -> bytes:
    """A PNG of the samples: objects on the left, the best-scored predictions on the right.

    As many predictions are drawn as the image has objects. A fixed score as the threshold would
    draw nothing for a weak model.
    """
    best: list[dict[str, Any]] = []
    for sample in samples:
        of_image = [item for item in predictions if item["image_id"] == sample.image_id]
        of_image.sort(key=lambda item: -float(item["score"]))
        best += of_image[: len(sample.annotations)]
    names = {int(category["id"]): str(category["name"]) for category in categories}
    return draw_scenes([(s.decode(), s.annotations, s.image_id) for s in samples], best, names)


def _results_file(
    samples: Sequence[DetectionSample], predictions: Sequence[dict[str, Any]]
) -> bytes:
    """COCO results as JSON.

    Image ids are the data set's own COCO ids if every sample has one and all are different;
    otherwise they are the samples' indices in the split, from 1.
    """
    source_ids = {sample.image_id: sample.source_id for sample in samples}
    if None not in source_ids.values() and len(set(source_ids.values())) == len(source_ids):
        predictions = [item | {"image_id": source_ids[item["image_id"]]} for item in predictions]
    return json.dumps(predictions, separators=(",", ":")).encode()
