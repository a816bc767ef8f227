"""What a detector finds in images: as COCO results, as metrics and as a picture.

Shapes: H x W an image, D its detections.
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

_DRAWN_SCENES = 4
_BOX_METRICS = {"coco": "box_ap", "voc": "box_ap50", "voc07": "box_ap50_11point"}
_MASKS_AT_ONCE = 16  # pasted into the image; all of a crowded one would take gigabytes


@torch.no_grad()
def predict(
    model: GeneralizedRCNN,
    samples: Sequence[DetectionSample],
    category_ids: Sequence[int],
    config: DetectionConfig,
) -> list[dict[str, Any]]:
    """What is found in this rank's share of the images, as COCO results; gather those of all ranks.

    The share are the images whose place in their split, modulo the world size, is the rank. An image is evaluated by
    itself: padded beside others it would be another.
    """
    device = next(model.parameters()).device
    model.eval()
    results: list[dict[str, Any]] = []
    for sample in samples:
        if (sample.image_id - 1) % world_size() == rank():
            with autocast(config, device):
                found = detect(model, sample.decode().to(device).float() / 255)
            results.extend(_coco_results(sample, found, category_ids))
    return results


def measure(
    config: DetectionConfig,
    samples: Sequence[DetectionSample],
    predictions: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
) -> TransferResult:
    """Average precision of the predictions of all ranks, scenes drawn, and the predictions as a file.

    Beside precisions it has `images_over_max_detections`: images with more objects than the detections that count, of
    which not all can be found. `predictions.json` has the images' own COCO ids if they all have one and no two the
    same, else their places in the split from 1.
    """
    masks = isinstance(config, MaskRcnnConfig)
    truth = ground_truth_of(
        ((s.image_id, s.height, s.width, s.annotations) for s in samples), categories
    )
    predictions = sorted(
        predictions, key=lambda item: int(item["image_id"])
    )  # on any number of ranks the same
    if config.metric == "coco":
        metrics = coco_metrics(
            truth, predictions, masks=masks, max_detections=config.max_detections
        )
    else:
        metrics = voc_metrics(truth, predictions)
    metric = headline_metric(config)
    over = sum(
        sum(not item["iscrowd"] for item in s.annotations) > config.max_detections for s in samples
    )
    return TransferResult(
        metric=metric,
        value=metrics[metric],
        metrics=metrics | {"images_over_max_detections": float(over)},
        images={"detections": _draw(samples[:_DRAWN_SCENES], predictions, categories)},
        files={"predictions.json": _results_file(samples, predictions)},
    )


def headline_metric(config: DetectionConfig) -> str:
    """The metric that a detector is compared by."""
    return "mask_ap" if isinstance(config, MaskRcnnConfig) else _BOX_METRICS[config.metric]


def detect(model: GeneralizedRCNN, image: Tensor) -> dict[str, Tensor]:
    """What torchvision finds in an image (3, H, W) in [0, 1], with masks (D, 1, 28, 28) not yet pasted into it."""
    scaled, _ = model.transform([image])
    features = model.backbone(scaled.tensors)
    proposals, _ = model.rpn(scaled, features)
    (found,), _ = model.roi_heads(features, proposals, scaled.image_sizes)
    boxes: Tensor = resize_boxes(found["boxes"], scaled.image_sizes[0], image.shape[-2:])
    detections: dict[str, Tensor] = found | {"boxes": boxes}
    return detections


def _coco_results(
    sample: DetectionSample, found: dict[str, Tensor], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """An image's detections: boxes (D, 4), labels (D,), scores (D,), perhaps masks (D, 1, 28, 28)."""
    boxes = found["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    detections = zip(
        boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
    )
    results: list[dict[str, Any]] = [
        {
            "image_id": sample.image_id,
            "category_id": category_ids[label - 1],
            "bbox": box,
            "score": score,
        }
        for box, label, score in detections
    ]
    if "masks" in found:
        for first in range(0, len(results), _MASKS_AT_ONCE):
            some = slice(first, first + _MASKS_AT_ONCE)
            pasted = paste_masks_in_image(
                found["masks"][some], found["boxes"][some], (sample.height, sample.width)
            )
            for result, mask in zip(results[some], pasted, strict=True):
                result["segmentation"] = encode_mask((mask[0] > 0.5).cpu().numpy())
    return results


def _draw(
    samples: Sequence[DetectionSample],
    predictions: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
) -> bytes:
    """A PNG of the samples with their objects to the left and what was found to the right."""
    shown = [item for sample in samples for item in _best_predictions(predictions, sample)]
    names = {int(category["id"]): str(category["name"]) for category in categories}
    return draw_scenes([(s.decode(), s.annotations, s.image_id) for s in samples], shown, names)


def _results_file(
    samples: Sequence[DetectionSample], predictions: Sequence[dict[str, Any]]
) -> bytes:
    """COCO results as JSON.

    Image ids are COCO's own if every sample has one and no two the same, else the samples' places in the split.
    """
    own = {sample.image_id: sample.source_id for sample in samples}
    if None not in own.values() and len(set(own.values())) == len(own):
        predictions = [item | {"image_id": own[item["image_id"]]} for item in predictions]
    return json.dumps(predictions, separators=(",", ":")).encode()


def _best_predictions(
    predictions: Sequence[dict[str, Any]], sample: DetectionSample
) -> list[dict[str, Any]]:
    """The highest-scored predictions of an image, as many as it has objects: a fixed score would hide a weak model."""
    found = [item for item in predictions if item["image_id"] == sample.image_id]
    return sorted(found, key=lambda item: -float(item["score"]))[: len(sample.annotations)]
