"""COCO metrics against pycocotools on random scenes, on ground truth, and counted by hand."""

import contextlib
import gc
import io
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as stock_rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hemoco.data.sources.folders import open_source
from hemoco.errors import ShardError
from hemoco.transfer.detection.coco_metric import (
    coco_metrics,
    decode_mask,
    encode_mask,
    ground_truth_of,
    metric_names,
)
from hemoco.transfer.detection.drawing import draw_scenes

SETS = {
    "sparse": "instances_val.json",
    "dsb2018": "instances_val.json",
    "polygons": "instances_all.json",
}
FAMILY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
HEIGHT, WIDTH = 240, 320  # of random scenes, large enough for COCO's large objects


def truth_of(coco_sets: dict[str, Path], name: str) -> dict[str, Any]:
    """The ground truth of a data set."""
    content: dict[str, Any] = json.loads((coco_sets[name] / SETS[name]).read_text())
    return content


def as_predictions(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """A perfect prediction of every object, with its mask decoded and encoded again."""
    sides = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    predictions = []
    for item in truth["annotations"]:
        if item["iscrowd"]:
            continue
        height, width = sides[item["image_id"]]
        mask = decode_mask(item["segmentation"], height, width).astype(bool)
        predictions.append(
            {
                "image_id": item["image_id"],
                "category_id": item["category_id"],
                "bbox": item["bbox"],
                "score": 0.9,
                "segmentation": encode_mask(mask),
            }
        )
    return predictions


def ellipse(box: NDArray[np.float64]) -> NDArray[np.bool_]:
    left, top, width, height = box
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    across, down = (columns + 0.5 - left) * 2 / width - 1, (rows + 0.5 - top) * 2 / height - 1
    inside: NDArray[np.bool_] = across**2 + down**2 <= 1
    return inside


def three_forms(box: NDArray[np.float64], form: int) -> Any:
    """A segmentation: the box as a polygon, or its ellipse as compressed or uncompressed RLE."""
    left, top, width, height = box.tolist()
    if form == 0:
        right, bottom = left + width, top + height
        return [[left, top, right, top, right, bottom, left, bottom]]
    mask = ellipse(box)
    if form == 1:
        return encode_mask(mask)
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=flat[-1])).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *edges, flat.size]).tolist()}


def random_scenes(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random ground truth and predictions.

    Objects are small to large, some are crowds. Predictions lie near objects; a fifth have a wrong
    category, and many have equal scores.
    """
    rng = np.random.default_rng(seed)
    categories = [{"id": number, "name": f"class {number}"} for number in (1, 4, 9)]
    images, predictions = [], []
    for image_id in range(8):
        sides = np.exp(rng.uniform(np.log(6), np.log(200), (12, 2)))
        corners = rng.uniform(0, (WIDTH - sides[:, 0], HEIGHT - sides[:, 1])).T
        boxes = np.concatenate([corners, sides], axis=1).round(1)
        labels, crowds = rng.choice([1, 4], 12), rng.random(12) < 0.2
        objects = [
            {
                "category_id": int(label),
                "bbox": box.tolist(),
                "area": float(box[2] * box[3]),
                "iscrowd": int(crowd),
                "segmentation": three_forms(box, int(rng.integers(3))),
            }
            for box, label, crowd in zip(boxes, labels, crowds, strict=True)
        ]
        images.append((image_id, HEIGHT, WIDTH, objects))
        for row in rng.integers(0, 12, 40):
            box = boxes[row] + rng.normal(0, 0.06, 4) * boxes[row][[2, 3, 2, 3]]
            category_id = labels[row] if rng.random() < 0.8 else 9
            predictions.append(
                {
                    "image_id": image_id,
                    "category_id": int(category_id),
                    "bbox": box.tolist(),
                    "score": float(rng.integers(20)) / 20,
                    "segmentation": three_forms(box, 1),
                }
            )
    return ground_truth_of(images, categories), predictions


def stock_evaluation(
    truth: dict[str, Any], predictions: list[dict[str, Any]], kind: str, max_detections: list[int]
) -> COCOeval:
    """pycocotools' evaluation.

    Predictions have boxes or masks but not both: given both, pycocotools takes the area of the box
    for masks too.
    """
    other = "segmentation" if kind == "bbox" else "bbox"
    results = deepcopy(predictions)
    for item in results:
        del item[other]
    with contextlib.redirect_stdout(io.StringIO()):
        stock = COCO()
        stock.dataset = deepcopy(truth)
        stock.createIndex()
        evaluation = COCOeval(stock, stock.loadRes(results), kind)
        evaluation.params.maxDets = max_detections
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def stock_metrics(evaluation: COCOeval, prefix: str) -> Iterator[tuple[str, float]]:
    """The defined metrics, from pycocotools' curves at its last maxDets."""
    precision, recall = evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]
    curves = {
        "ap": precision[..., 0],
        "ap50": precision[0, ..., 0],
        "ap75": precision[5, ..., 0],
        "ar": recall[..., 0],
    }
    for index, name in enumerate(("small", "medium", "large"), 1):
        curves[f"ap_{name}"] = precision[..., index]
    for index, category_id in enumerate(evaluation.params.catIds):
        curves[f"ap/{evaluation.cocoGt.cats[category_id]['name']}"] = precision[:, :, index, 0]
    for name, curve in curves.items():
        if (curve > -1).any():
            yield f"{prefix}_{name}", float(curve[curve > -1].mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_detections", [1, 7, 100])
def test_random_predictions_score_as_with_stock_pycocotools(seed: int, max_detections: int) -> None:
    truth, predictions = random_scenes(seed)
    expected: dict[str, float] = {}
    for kind, prefix in (("bbox", "box"), ("segm", "mask")):
        evaluation = stock_evaluation(truth, predictions, kind, [max_detections])
        expected |= dict(stock_metrics(evaluation, prefix))
    metrics = coco_metrics(truth, predictions, masks=True, max_detections=max_detections)
    assert metrics == pytest.approx(expected, abs=1e-6)
    # the third category has predictions only, so it has no metric
    assert len(metrics) == 2 * (len(FAMILY) + 2)


def test_box_metrics_are_those_that_pycocotools_prints() -> None:
    truth, predictions = random_scenes(5)
    evaluation = stock_evaluation(truth, predictions, "bbox", [1, 10, 100])
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    metrics = coco_metrics(truth, predictions, masks=False, max_detections=100)
    # between them, pycocotools prints AR with 1 and 10 detections
    printed = [*evaluation.stats[:6], evaluation.stats[8]]
    assert [metrics[f"box_{name}"] for name in FAMILY] == pytest.approx(printed, abs=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_ground_truth_as_predictions_scores_one_in_all_metrics(
    name: str, coco_sets: dict[str, Path]
) -> None:
    truth = truth_of(coco_sets, name)
    metrics = coco_metrics(truth, as_predictions(truth), masks=True, max_detections=400)
    assert {"box_ap", "mask_ap", "box_ar", "mask_ar"} < metrics.keys()
    assert metrics == dict.fromkeys(metrics, pytest.approx(1.0))


def test_boxes_of_voc_xml_as_predictions_score_one(test_data: Path) -> None:
    source = open_source([str(test_data / "bccd")], "train")
    images = (
        (index, 480, 640, image.annotations or []) for index, image in enumerate(source.items)
    )
    truth = ground_truth_of(images, source.categories)
    predictions = [item | {"score": 0.9} for item in truth["annotations"]]
    metrics = coco_metrics(truth, predictions, masks=False, max_detections=100)
    assert {"box_ap/RBC", "box_ap/WBC", "box_ap/Platelets"} < metrics.keys()
    assert metrics == dict.fromkeys(metrics, pytest.approx(1.0))


def test_shuffled_labels_score_nearly_zero(coco_sets: dict[str, Path]) -> None:
    truth = truth_of(coco_sets, "sparse")
    predictions = as_predictions(truth)
    labels = [item["category_id"] for item in predictions]
    shuffled_labels = np.random.default_rng(0).permutation(labels).tolist()
    shuffled = [
        item | {"category_id": label}
        for item, label in zip(predictions, shuffled_labels, strict=True)
    ]
    metrics = coco_metrics(truth, shuffled, masks=True, max_detections=100)
    assert metrics["box_ap"] < 0.05 and metrics["mask_ap"] < 0.05


def test_more_objects_than_max_detections_cannot_all_be_found(coco_sets: dict[str, Path]) -> None:
    truth = truth_of(coco_sets, "dsb2018")
    predictions = [item | {"score": 0.9} for item in truth["annotations"]]
    image_ids = [item["image_id"] for item in truth["annotations"]]
    _, counts = np.unique(image_ids, return_counts=True)
    for max_detections in (5, 100, 400):
        recall = np.minimum(counts, max_detections).sum() / counts.sum()
        metrics = coco_metrics(truth, predictions, masks=False, max_detections=max_detections)
        assert metrics["box_ar"] == pytest.approx(recall)


def test_without_predictions_all_metrics_are_zero(coco_sets: dict[str, Path]) -> None:
    truth = truth_of(coco_sets, "polygons")
    names: list[str] = []
    for kind in ("box", "mask"):
        names += [f"{kind}_{name}" for name in FAMILY if name != "ap_small"]
        names += [f"{kind}_ap/{category['name']}" for category in truth["categories"]]
    assert coco_metrics(truth, [], masks=True, max_detections=100) == dict.fromkeys(names, 0.0)


def square(side: int) -> dict[str, Any]:
    mask = np.zeros((40, 40), bool)
    mask[:side, :20] = True
    return encode_mask(mask)


ITEM = {
    "category_id": 90,
    "bbox": [0, 0, 20, 20],
    "area": 400,
    "iscrowd": 0,
    "segmentation": square(20),
}
PREDICTION = {
    "image_id": 7,
    "category_id": 90,
    "bbox": [0, 0, 20, 20],
    "score": 0.3,
    "segmentation": square(16),
}
CATEGORIES = [{"id": 3, "name": "absent"}, {"id": 90, "name": "square"}]


def test_a_mask_of_iou_0_8_and_a_perfect_box_score_as_counted_by_hand() -> None:
    truth = ground_truth_of([(7, 40, 40, [ITEM])], CATEGORIES)
    scores = coco_metrics(truth, [PREDICTION], masks=True, max_detections=10)
    names = ("ap", "ap50", "ap75", "ap_small", "ar", "ap/square")
    # thresholds 0.50 to 0.80 are met, 0.85 to 0.95 are not
    masks = dict(zip(names, (0.7, 1.0, 1.0, 0.7, 0.7, 0.7), strict=True))
    expected = {f"box_{name}": 1.0 for name in names} | {
        f"mask_{name}": value for name, value in masks.items()
    }
    assert scores == pytest.approx(expected)


def test_a_crowd_neither_counts_nor_hurts() -> None:
    crowd = ITEM | {"iscrowd": 1, "bbox": [20, 0, 20, 40]}
    truth = ground_truth_of([(7, 40, 40, [ITEM, crowd])], CATEGORIES)
    inside = PREDICTION | {"score": 0.9, "bbox": [25, 5, 5, 5]}
    metrics = coco_metrics(truth, [PREDICTION, inside], masks=False, max_detections=10)
    assert metrics["box_ap"] == pytest.approx(1.0)


def test_scoring_is_silent_and_leaves_its_arguments_as_they_were(
    capfd: pytest.CaptureFixture[str],
) -> None:
    truth, predictions = random_scenes(0)
    before = deepcopy([truth, predictions])
    coco_metrics(truth, predictions, masks=True, max_detections=100)
    assert [truth, predictions] == before
    assert capfd.readouterr() == ("", "")


def test_garbage_is_collected_again_after_scoring_and_after_failing() -> None:
    truth = ground_truth_of([(7, 40, 40, [ITEM])], CATEGORIES)
    coco_metrics(truth, [PREDICTION], masks=True, max_detections=10)
    assert gc.isenabled()
    without_mask = {key: PREDICTION[key] for key in PREDICTION if key != "segmentation"}
    with pytest.raises(KeyError, match="segmentation"):
        coco_metrics(truth, [without_mask], masks=True, max_detections=1)
    assert gc.isenabled()


def test_ids_of_annotations_have_no_effect() -> None:
    truth, predictions = random_scenes(0)
    expected = coco_metrics(truth, predictions, masks=False, max_detections=100)
    for item in truth["annotations"]:
        item["id"] = 0
    assert coco_metrics(truth, predictions, masks=False, max_detections=100) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": [{"id": 7, "height": 40, "width": 40}] * 2},
            r"images have the ids \[7\] more than once",
        ),
        (
            {"categories": [*CATEGORIES, CATEGORIES[0]]},
            r"categories have the ids \[3\] more than once",
        ),
        ({"images": []}, r"annotations have image_id \[7\]"),
        ({"categories": CATEGORIES[:1]}, r"annotations have category_id \[90\]"),
        ({"annotations": []}, "none of the 1 images has an object"),
    ],
)
def test_ground_truth_that_evaluators_would_misread_is_refused(
    change: dict[str, Any], message: str
) -> None:
    truth = ground_truth_of([(7, 40, 40, [ITEM])], CATEGORIES) | change
    with pytest.raises(ShardError, match=message):
        coco_metrics(truth, [], masks=False, max_detections=10)


@pytest.mark.parametrize("change", [{"image_id": 8}, {"category_id": 4}])
def test_predictions_of_unknown_images_and_categories_are_refused(change: dict[str, Any]) -> None:
    truth = ground_truth_of([(7, 40, 40, [ITEM])], CATEGORIES)
    with pytest.raises(ShardError, match=f"predictions have {next(iter(change))}"):
        coco_metrics(truth, [PREDICTION | change], masks=False, max_detections=10)


def test_names_of_categories_become_parts_of_metric_keys_that_differ() -> None:
    names = ["hair drier", "a/b", "a:b", "a_b", "..", "", "Ähre-2.0", "a_b_2"]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    safe = ["hair drier", "a_b", "a_b_2", "a_b_3", "4", "5", "Ähre-2.0", "a_b_2_7"]
    assert list(metric_names(reversed(categories)).items()) == list(enumerate(safe))


def test_masks_of_all_three_forms_decode_alike() -> None:
    polygon = [[10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]]
    expected = np.zeros((40, 50), np.uint8)
    expected[5:25, 10:30] = 1
    runs = [10 * 40 + 5] + [20, 20] * 19 + [20, 20 * 40 + 15]
    assert (decode_mask(polygon, 40, 50) == expected).all()
    assert (decode_mask({"size": [40, 50], "counts": runs}, 40, 50) == expected).all()
    assert (decode_mask(encode_mask(expected.astype(bool)), 40, 50) == expected).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
@pytest.mark.parametrize("name", SETS)
def test_masks_of_sets_decode_as_with_stock_pycocotools(
    name: str, coco_sets: dict[str, Path]
) -> None:
    truth = truth_of(coco_sets, name)
    stock = COCO()
    stock.dataset = deepcopy(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        stock.createIndex()
    for item in truth["annotations"]:
        image = stock.imgs[item["image_id"]]
        mask = decode_mask(item["segmentation"], image["height"], image["width"])
        expected = stock_rle.decode(stock.annToRLE(item))
        assert mask.dtype == np.uint8 and np.array_equal(mask, expected)
        encoded = encode_mask(mask.astype(bool))
        assert encoded["counts"].encode() == stock_rle.encode(expected)["counts"]


def test_a_polygon_of_two_points_is_refused() -> None:
    with pytest.raises(ShardError, match="a polygon has 4 numbers"):
        decode_mask([[1.0, 2.0, 3.0, 4.0]], 40, 50)


def drawn(
    *scenes: tuple[torch.Tensor, list[dict[str, Any]], int], predictions: list[dict[str, Any]]
) -> Image.Image:
    return Image.open(io.BytesIO(draw_scenes(list(scenes), predictions, {90: "square"})))


def test_predictions_without_masks_are_drawn_as_boxes() -> None:
    grey = torch.full((3, 40, 40), 128, dtype=torch.uint8)
    without = {key: value for key, value in PREDICTION.items() if key != "segmentation"}
    pixels = np.asarray(drawn((grey, [ITEM], 7), predictions=[without]))
    truth, predicted = pixels[:, :288], pixels[:, 292:]
    inside = (slice(110, 130), slice(110, 130))
    assert (predicted[inside] == 128).all() and (truth[inside] != 128).any()
    assert (predicted[70, 0] == truth[70, 0]).all() and (predicted[70, 0] != 128).any()


def test_images_without_objects_and_no_images_are_drawn() -> None:
    grey = torch.full((3, 40, 60), 128, dtype=torch.uint8)
    assert drawn((grey, [], 7), predictions=[]).size == (2 * 432 + 4, 288)
    assert drawn(predictions=[]).size == (1, 1)
