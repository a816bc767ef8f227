"""COCO AP: ground truth given as predictions scores 1, wrong labels score nearly 0."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from hemoco.transfer.coco import decode_mask, encode_mask, ground_truth_of, mask_ap

DATA = Path(__file__).parents[2] / "shared" / "data"
METRICS = ("box_ap", "box_ap50", "mask_ap", "mask_ap50", "mask_ap75")


def truth_of(name: str, images: int) -> dict[str, Any]:
    """The first images of a real data set."""
    path = DATA / name / "instances_val.json"
    if not path.exists():
        pytest.fail(f"{path} is missing")
    content: dict[str, Any] = json.loads(path.read_text())
    content["images"] = content["images"][:images]
    known = {image["id"] for image in content["images"]}
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] in known]
    return content


def as_predictions(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Every object as if it had been found, with the mask passed through pixels."""
    sides = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    return [
        {
            "image_id": item["image_id"],
            "category_id": item["category_id"],
            "bbox": item["bbox"],
            "score": 0.9,
            "segmentation": encode_mask(decode_mask(item["segmentation"], *sides[item["image_id"]]).astype(bool)),
        }
        for item in truth["annotations"]
        if not item["iscrowd"]
    ]


@pytest.mark.parametrize(("name", "images"), [("coco_tiny", 20), ("dsb2018", 4)])
def test_ground_truth_as_predictions_scores_one(name: str, images: int) -> None:
    truth = truth_of(name, images)
    assert mask_ap(truth, as_predictions(truth), 400) == dict.fromkeys(METRICS, pytest.approx(1.0))


def test_wrong_labels_score_nearly_zero() -> None:
    truth = truth_of("coco_tiny", 20)
    predictions = as_predictions(truth)
    labels = np.random.default_rng(0).permutation([category["id"] for category in truth["categories"]])
    for item in predictions:
        item["category_id"] = int(labels[item["category_id"] % len(labels)])
    assert mask_ap(truth, predictions, 100)["mask_ap"] < 0.05


def test_the_cap_of_detections_counts() -> None:
    truth = truth_of("dsb2018", 4)
    assert mask_ap(truth, as_predictions(truth), 5)["mask_ap"] < 0.5


def test_no_predictions_score_zero() -> None:
    assert mask_ap(truth_of("coco_tiny", 2), [], 100) == dict.fromkeys(METRICS, 0.0)


def square(side: int) -> dict[str, Any]:
    mask = np.zeros((40, 40), bool)
    mask[:side, :20] = True
    return encode_mask(mask)


def test_a_mask_of_iou_0_8_and_a_perfect_box_score_as_counted_by_hand() -> None:
    item = {"category_id": 90, "bbox": [0, 0, 20, 20], "area": 400, "iscrowd": 0, "segmentation": square(20)}
    truth = ground_truth_of([(7, 40, 40, [item])], [{"id": 3, "name": "absent"}, {"id": 90, "name": "square"}])
    found = [{"image_id": 7, "category_id": 90, "bbox": [0, 0, 20, 20], "score": 0.3, "segmentation": square(16)}]
    scores = mask_ap(truth, found, 10)
    assert scores["box_ap"] == pytest.approx(1.0)
    # thresholds 0.50 to 0.80 are met, 0.85 to 0.95 are not
    assert scores["mask_ap"] == pytest.approx(0.7)
    assert (scores["mask_ap50"], scores["mask_ap75"]) == (pytest.approx(1.0), pytest.approx(1.0))


def test_scoring_leaves_its_arguments_as_they_were() -> None:
    truth = truth_of("coco_tiny", 3)
    predictions = as_predictions(truth)
    before = json.dumps([truth, predictions])
    mask_ap(truth, predictions, 100)
    assert json.dumps([truth, predictions]) == before


def test_masks_of_all_three_forms_decode_alike() -> None:
    polygon = [[10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]]
    expected = np.zeros((40, 50), np.uint8)
    expected[5:25, 10:30] = 1
    runs = [10 * 40 + 5] + [20, 20] * 19 + [20, 20 * 40 + 15]
    assert (decode_mask(polygon, 40, 50) == expected).all()
    assert (decode_mask({"size": [40, 50], "counts": runs}, 40, 50) == expected).all()
    assert (decode_mask(encode_mask(expected.astype(bool)), 40, 50) == expected).all()
    assert rle.area(encode_mask(expected.astype(bool))) == 400
