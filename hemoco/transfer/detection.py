"""Mask R-CNN transfer: torchvision's Mask R-CNN on a pretrained ResNet with a feature pyramid, fine-tuned whole.

Batch normalisation stays trainable in the backbone and is added to the pyramid, as MoCo's protocol has it (He et al.
2020, section 4.2): statistics of contrastive pretraining are far from those of supervised weights.

Shapes: H x W an image, D objects or detections of an image.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator

from hemoco.config import MaskRcnnConfig
from hemoco.data.decode import decode_image
from hemoco.data.shards import read_index, read_shard
from hemoco.encoder import Backbone, feature_channels, seeded
from hemoco.errors import ShardError, TrainingError
from hemoco.transfer.coco import decode_mask, encode_mask, ground_truth_of, mask_ap
from hemoco.transfer.drawing import draw_scenes
from hemoco.transfer.result import TransferResult

_LOG_STEPS = 10
_DRAWN_SCENES = 4
_POOLED_SIDE = 7  # of the box head's input
_MOMENTUM = 0.9
_PATIENCE_S = 600.0
_SCENES_AT_ONCE = 8  # in evaluation


@dataclasses.dataclass(frozen=True)
class DetectionSample:
    """An image and its objects."""

    image: Tensor
    """uint8 (3, H, W)."""
    annotations: list[dict[str, Any]]
    """COCO annotations: bbox (x, y, width, height), category_id, iscrowd, segmentation (polygons or RLE)."""
    image_id: int


def load_detection_samples(data_url: str, split: str) -> list[DetectionSample]:
    """All annotated images of a split, decoded.

    Raises:
        ShardError: an image has no annotations, or cannot be decoded.
    """
    samples: list[DetectionSample] = []
    for shard in read_index(data_url, patience_s=_PATIENCE_S).split(split):
        for sample in read_shard(data_url, shard):
            if sample.annotations is None:
                raise ShardError(f"{data_url}: {sample.key} has no annotations; Mask R-CNN needs data packed from COCO")
            # the place is an id too, and one that no two images share
            samples.append(DetectionSample(decode_image(sample.image), sample.annotations, len(samples) + 1))
    return samples


def build_mask_rcnn(backbone: Backbone, config: MaskRcnnConfig, num_classes: int) -> MaskRCNN:
    """Mask R-CNN around the backbone's own encoder, which it changes; nothing is frozen.

    Args:
        backbone: not copied.
        config: sizes of the parts.
        num_classes: categories and the background.
    """
    channels = config.fpn_channels
    levels = {f"layer{level}": str(level - 1) for level in (1, 2, 3, 4)}
    body = BackboneWithFPN(
        backbone.encoder, levels, feature_channels(backbone.encoder), channels, norm_layer=nn.BatchNorm2d
    )
    return MaskRCNN(
        body,
        min_size=config.min_size,
        max_size=config.max_size,
        image_mean=list(backbone.mean),
        image_std=list(backbone.std),
        rpn_anchor_generator=AnchorGenerator(
            sizes=tuple((size,) for size in config.anchor_sizes), aspect_ratios=((0.5, 1.0, 2.0),) * 5
        ),
        rpn_pre_nms_top_n_train=2 * config.proposals,
        rpn_pre_nms_top_n_test=config.proposals,
        rpn_post_nms_top_n_train=2 * config.proposals,
        rpn_post_nms_top_n_test=config.proposals,
        box_head=TwoMLPHead(channels * _POOLED_SIDE**2, config.box_features),
        box_predictor=FastRCNNPredictor(config.box_features, num_classes),
        box_batch_size_per_image=config.rois_per_image,
        box_detections_per_img=config.max_detections,
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes),
    )


def run_mask_rcnn(
    config: MaskRcnnConfig,
    backbone: Backbone,
    train: list[DetectionSample],
    test: list[DetectionSample],
    categories: Sequence[dict[str, Any]],
    seed: int,
) -> TransferResult:
    """Fine-tunes Mask R-CNN from the backbone, which it changes, and measures COCO AP on the test images.

    Raises:
        ShardError: no training image has an object.
        TrainingError: the loss is not finite.
    """
    cleaned = [clean_annotations(sample) for sample in train + test]
    samples = [item.sample for item in cleaned]
    train, test = samples[: len(train)], samples[len(train) :]
    if not any(sample.annotations for sample in train):
        raise ShardError(f"none of the {len(train)} training images has an object; Mask R-CNN needs some")
    category_ids = sorted(int(category["id"]) for category in categories)
    device = torch.device("cuda" if config.gpus else "cpu")
    with seeded(seed):  # of the new layers, and of torchvision's sampling of proposals
        model = build_mask_rcnn(backbone, config, len(category_ids) + 1).to(device)
        history = _train(model, config, train, category_ids, seed)
    predictions = _predict(model, test, category_ids)
    truth = ground_truth_of(((s.image_id, *s.image.shape[1:], s.annotations) for s in test), categories)
    counts = {
        "annotations_clipped": float(sum(item.clipped for item in cleaned)),
        "annotations_dropped": float(sum(item.dropped for item in cleaned)),
    }
    precisions = mask_ap(truth, predictions, config.max_detections)
    drawn = test[:_DRAWN_SCENES]
    shown = [item for sample in drawn for item in _best_predictions(predictions, sample)]
    names = {int(category["id"]): str(category["name"]) for category in categories}
    drawing = draw_scenes([(s.image, s.annotations, s.image_id) for s in drawn], shown, names)
    return TransferResult(
        metric="mask_ap",
        value=precisions["mask_ap"],
        metrics=precisions | counts,
        history=history,
        images={"detections": drawing},
    )


def _best_predictions(predictions: list[dict[str, Any]], sample: DetectionSample) -> list[dict[str, Any]]:
    """The highest-scored predictions of an image, as many as it has objects: a fixed score would hide a weak model."""
    found = [item for item in predictions if item["image_id"] == sample.image_id]
    return sorted(found, key=lambda item: -float(item["score"]))[: len(sample.annotations)]


@dataclasses.dataclass(frozen=True)
class CleanedSample:
    """A sample whose annotations can be used, and what that took."""

    sample: DetectionSample
    clipped: int
    """Boxes that reached outside the image."""
    dropped: int
    """Annotations without a mask, or with a box of no area inside the image."""


def clean_annotations(sample: DetectionSample) -> CleanedSample:
    """Clips boxes to the image, drops annotations without area or mask, and fills in what COCO files may omit."""
    height, width = sample.image.shape[1:]
    kept: list[dict[str, Any]] = []
    clipped = 0
    for item in sample.annotations:
        x, y, wide, high = item["bbox"]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + wide, width), min(y + high, height)
        if right <= left or bottom <= top or not item.get("segmentation"):
            continue
        # polygons' boxes are rounded to two decimals, so a hundredth outside is none
        clipped += max(left - x, top - y, x + wide - right, y + high - bottom) > 0.01
        box = [left, top, right - left, bottom - top]
        kept.append({"area": box[2] * box[3], "iscrowd": 0} | item | {"bbox": box})
    usable = dataclasses.replace(sample, annotations=kept)
    return CleanedSample(usable, clipped=clipped, dropped=len(sample.annotations) - len(kept))


def detection_lr(step: int, steps: int, base_lr: float, warmup_steps: int) -> float:
    """Linear warm-up from near 0, then x0.1 at 2/3 and again at 8/9 of the steps (60k and 80k of 90k)."""
    drops = (3 * step >= 2 * steps) + (9 * step >= 8 * steps)
    return base_lr * 0.1**drops * min(1.0, (step + 1) / (warmup_steps + 1))


def build_target(
    annotations: list[dict[str, Any]], height: int, width: int, category_ids: list[int]
) -> dict[str, Tensor]:
    """What torchvision trains on; crowds are left out.

    Returns:
        boxes float32 (D, 4) as x0, y0, x1, y1; labels int64 (D,) from 1; masks uint8 (D, H, W).
    """
    objects = [item for item in annotations if not item["iscrowd"]]
    boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = np.zeros((len(objects), height, width), np.uint8)
    for mask, item in zip(masks, objects, strict=True):
        mask[:] = decode_mask(item["segmentation"], height, width)
    labels = [category_ids.index(item["category_id"]) + 1 for item in objects]
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": torch.from_numpy(masks)}


def flip_horizontally(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """An image (3, H, W) and its target, mirrored."""
    left, top, right, bottom = target["boxes"].unbind(dim=1)
    width = image.shape[-1]
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    return image.flip(-1), target | {"boxes": boxes, "masks": target["masks"].flip(-1)}


def _train(
    model: MaskRCNN, config: MaskRcnnConfig, samples: list[DetectionSample], category_ids: list[int], seed: int
) -> list[tuple[int, dict[str, float]]]:
    """Trains in place.

    Returns:
        Losses by step.
    """
    optimizer = _optimizer(model, config)
    history: list[tuple[int, dict[str, float]]] = []
    batches = _batches(config, samples, category_ids, seed)
    device = next(model.parameters()).device
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = detection_lr(step, config.steps, config.lr, config.warmup_steps)
        images, targets = next(batches)
        losses: dict[str, Tensor] = model(
            [image.to(device) for image in images], [{k: v.to(device) for k, v in t.items()} for t in targets]
        )
        loss = torch.stack(list(losses.values())).sum()
        if not math.isfinite(loss.item()):
            raise TrainingError(f"mask_rcnn: the loss is {loss.item()} at step {step + 1}: lower mask_rcnn.lr")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % _LOG_STEPS == 0 or step + 1 == config.steps:
            history.append((step + 1, {"loss": loss.item()} | {name: value.item() for name, value in losses.items()}))
    return history


def _optimizer(model: nn.Module, config: MaskRcnnConfig) -> torch.optim.SGD:
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    of_norms = {id(parameter) for parameter in norms}
    others = [p for p in model.parameters() if id(p) not in of_norms]
    groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=config.lr, momentum=_MOMENTUM)


def _batches(
    config: MaskRcnnConfig, samples: list[DetectionSample], category_ids: list[int], seed: int
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Endless batches of images in [0, 1] and targets; masks are decoded only here."""
    rng = np.random.default_rng([seed, len(samples)])
    order: list[int] = []
    while True:
        images: list[Tensor] = []
        targets: list[dict[str, Tensor]] = []
        while len(images) < config.batch_size:
            order = order or rng.permutation(len(samples)).tolist()
            sample = samples[order.pop()]
            image = sample.image.float() / 255
            height, width = image.shape[1:]
            target = build_target(sample.annotations, height, width, category_ids)
            if rng.random() < config.flip:
                image, target = flip_horizontally(image, target)
            images.append(image)
            targets.append(target)
        yield images, targets


@torch.no_grad()
def _predict(model: MaskRCNN, samples: list[DetectionSample], category_ids: list[int]) -> list[dict[str, Any]]:
    """COCO results of all images; masks become RLE image by image."""
    device = next(model.parameters()).device
    model.eval()
    results: list[dict[str, Any]] = []
    for first in range(0, len(samples), _SCENES_AT_ONCE):
        some = samples[first : first + _SCENES_AT_ONCE]
        outputs = model([sample.image.to(device).float() / 255 for sample in some])
        for sample, output in zip(some, outputs, strict=True):
            results.extend(_coco_results(sample.image_id, output, category_ids))
    return results


def _coco_results(image_id: int, output: dict[str, Tensor], category_ids: list[int]) -> list[dict[str, Any]]:
    """One image's detections: boxes (D, 4), labels (D,), scores (D,), masks (D, 1, H, W) as probabilities."""
    boxes = output["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    found = zip(boxes.tolist(), output["labels"].tolist(), output["scores"].tolist(), output["masks"], strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": box,
            "score": score,
            "segmentation": encode_mask((mask[0] > 0.5).cpu().numpy()),
        }
        for box, label, score, mask in found
    ]
