"""Mask R-CNN transfer: what is trainable, what targets look like, and that it can learn."""

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hemoco.config import EncoderConfig, MaskRcnnConfig
from hemoco.encoder import Backbone, build_encoder
from hemoco.errors import ShardError, TrainingError
from hemoco.transfer import detection
from hemoco.transfer.coco import encode_mask
from hemoco.transfer.detection import DetectionSample, build_mask_rcnn, run_mask_rcnn

CONFIG = MaskRcnnConfig(
    steps=2,
    batch_size=2,
    lr=0.02,
    warmup_steps=1,
    min_size=64,
    max_size=64,
    anchor_sizes=(8, 16, 32, 48, 64),
    fpn_channels=16,
    box_features=32,
    rois_per_image=16,
    proposals=50,
    max_detections=10,
)
CATEGORIES = [{"id": 7, "name": "bright"}, {"id": 3, "name": "dark"}]


def backbone(seed: int = 0) -> Backbone:
    config = EncoderConfig(architecture="resnet10t")
    return Backbone(build_encoder(config, seed), config, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def square(left: int, top: int, side: int) -> dict[str, Any]:
    mask = np.zeros((64, 64), bool)
    mask[top : top + side, left : left + side] = True
    return {"category_id": 7, "bbox": [left, top, side, side], "segmentation": encode_mask(mask)}


def sample(image_id: int, annotations: list[dict[str, Any]] | None = None) -> DetectionSample:
    pixels = torch.full((3, 64, 64), 60, dtype=torch.uint8)
    pixels[:, 10:40, 20:50] = 220
    return DetectionSample(pixels, [square(20, 10, 30)] if annotations is None else annotations, image_id)


def test_everything_is_trainable_and_body_and_pyramid_have_batch_norm() -> None:
    model = build_mask_rcnn(backbone(), CONFIG, num_classes=3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.body.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.fpn.modules())


def test_body_computes_what_the_encoder_computes() -> None:
    whole = backbone().eval()
    images = torch.randn(2, 3, 64, 64)
    expected = whole.encoder.forward_features(images)  # type: ignore[operator]
    body = build_mask_rcnn(whole, CONFIG, num_classes=3).eval().backbone.body
    torch.testing.assert_close(body(images)["3"], expected)


def test_images_are_normalised_as_the_backbones_were() -> None:
    transform = build_mask_rcnn(backbone(), CONFIG, num_classes=3).transform
    assert (transform.image_mean, transform.image_std) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2])


def test_boxes_outside_are_clipped_or_dropped_and_counted() -> None:
    outside, flat, half = square(0, 0, 10), square(5, 5, 10), square(60, 60, 4)
    outside["bbox"], flat["bbox"], half["bbox"] = [70, 5, 10, 10], [5, 5, 10, 0], [60, 60, 20, 20]
    cleaned = detection.clean_annotations(sample(1, [outside, flat, half, square(5, 5, 10)]))
    assert (cleaned.clipped, cleaned.dropped) == (1, 2)
    assert [item["bbox"] for item in cleaned.sample.annotations] == [[60, 60, 4, 4], [5, 5, 10, 10]]


def test_targets_have_corner_boxes_labels_from_one_and_no_crowds() -> None:
    crowd = square(0, 0, 9) | {"iscrowd": 1}
    target = detection.build_target([crowd, square(20, 10, 30) | {"iscrowd": 0}], 64, 64, [3, 7])
    assert target["boxes"].tolist() == [[20, 10, 50, 40]]
    assert target["labels"].tolist() == [2]
    assert target["masks"].sum() == 900 and target["masks"][0, 10, 49] == 1


def test_flipping_moves_box_and_mask_alike() -> None:
    target = detection.build_target([square(20, 10, 30) | {"iscrowd": 0}], 64, 64, [7])
    image, flipped = detection.flip_horizontally(sample(1).image, target)
    left, top, right, bottom = flipped["boxes"][0].int().tolist()
    assert (left, top, right, bottom) == (14, 10, 44, 40)
    assert (flipped["masks"][0, top:bottom, left:right] == 1).all()
    assert (image[0, top:bottom, left:right] == 220).all()


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.01), (8, 0.09), (9, 0.1), (59, 0.1), (60, 0.01), (79, 0.01), (80, 0.001)]
)
def test_learning_rate_warms_up_and_drops_twice(step: int, expected: float) -> None:
    assert detection.detection_lr(step, 90, 0.1, 9) == pytest.approx(expected)


def test_results_are_named_and_the_drawing_is_an_image() -> None:
    bad = square(0, 0, 5) | {"bbox": [90, 0, 5, 5]}
    result = run_mask_rcnn(CONFIG, backbone(), [sample(1), sample(2, [bad])], [sample(1)], CATEGORIES, seed=0)
    assert result.value == result.metrics[result.metric]
    assert result.metrics["annotations_dropped"] == 1
    assert result.history[-1][0] == CONFIG.steps and np.isfinite(result.history[-1][1]["loss"])
    assert Image.open(io.BytesIO(result.images["detections"])).format == "PNG"


def test_the_same_seed_gives_the_same_losses() -> None:
    runs = [run_mask_rcnn(CONFIG, backbone(), [sample(1)], [sample(1)], CATEGORIES, seed=5) for _ in range(2)]
    assert runs[0].history == runs[1].history


def test_it_finds_a_square_that_it_was_trained_on() -> None:
    config = dataclasses.replace(CONFIG, steps=120, warmup_steps=5)
    result = run_mask_rcnn(config, backbone(), [sample(1), sample(2)], [sample(1)], CATEGORIES, seed=0)
    assert result.metrics["mask_ap50"] > 0.9


def test_a_loss_that_is_not_finite_ends_training() -> None:
    config = dataclasses.replace(CONFIG, lr=1e30, steps=20, warmup_steps=0)
    with pytest.raises(TrainingError, match=r"lower mask_rcnn\.lr"):
        run_mask_rcnn(config, backbone(), [sample(1)], [sample(1)], CATEGORIES, seed=0)


def test_training_images_without_any_object_are_refused() -> None:
    with pytest.raises(ShardError, match="none of the 1 training images"):
        run_mask_rcnn(CONFIG, backbone(), [sample(1, [])], [sample(1)], CATEGORIES, seed=0)
