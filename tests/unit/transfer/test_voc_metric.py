"""VOC's average precision against a slow copy of the development kit, and counted by hand."""

import json
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hemoco.data.sources.folders import open_source
from hemoco.errors import ShardError
from hemoco.transfer.detection.coco_metric import ground_truth_of
from hemoco.transfer.detection.voc_metric import voc_metrics

CATEGORIES = [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 6, "name": "absent"}]
MEANS = ("box_ap", "box_ap50", "box_ap75", "box_ap_11point", "box_ap50_11point", "box_ap75_11point")


def thing(left: float, top: float = 0, side: float = 10, **fields: Any) -> dict[str, Any]:
    """An annotation of a square."""
    return {
        "category_id": 2,
        "bbox": [left, top, side, side],
        "area": side**2,
        "iscrowd": 0,
    } | fields


def seen(left: float, score: float, image_id: int = 1, **fields: Any) -> dict[str, Any]:
    """A prediction of a square."""
    return {
        "image_id": image_id,
        "category_id": 2,
        "bbox": [left, 0, 10, 10],
        "score": score,
    } | fields


def truth_of(*images: list[dict[str, Any]]) -> dict[str, Any]:
    return ground_truth_of(
        ((number, 99, 99, objects) for number, objects in enumerate(images, 1)), CATEGORIES
    )


def corners(bbox: list[float]) -> tuple[float, float, float, float]:
    """xmin, ymin, xmax and ymax as an XML file has them."""
    return bbox[0] + 1, bbox[1] + 1, bbox[0] + bbox[2], bbox[1] + bbox[3]


def kit_overlap(first: list[float], second: list[float]) -> float:
    """The IoU of VOCevaldet.m, whose boxes include both corner pixels."""
    a, b = corners(first), corners(second)
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def kit_curve(
    objects: list[dict[str, Any]], detections: list[dict[str, Any]], threshold: float
) -> tuple[list[float], list[float]]:
    """Recall and precision of one class by VOCevaldet.m, one detection after the other."""
    by_image = defaultdict(list)
    for item in objects:
        by_image[item["image_id"]].append(item)
    taken: set[int] = set()
    positives = sum(not item["difficult"] for item in objects)
    true = false = 0
    recall, precision = [], []
    for item in sorted(detections, key=lambda item: item["score"], reverse=True):
        highest, match = -1.0, None
        for candidate in by_image[item["image_id"]]:
            overlap = kit_overlap(candidate["bbox"], item["bbox"])
            if overlap > highest:
                highest, match = overlap, candidate
        if match is None or highest < threshold or match["id"] in taken:
            false += 1
        elif not match["difficult"]:
            taken.add(match["id"])
            true += 1
        if true + false:
            recall.append(true / positives)
            precision.append(true / (true + false))
    return recall, precision


def kit_area(recall: list[float], precision: list[float]) -> float:
    """The area under the curve by VOCap.m."""
    recalls, precisions = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for index in range(len(precisions) - 2, -1, -1):
        precisions[index] = max(precisions[index], precisions[index + 1])
    steps = zip(recalls, recalls[1:], precisions[1:], strict=False)
    return sum((after - before) * height for before, after, height in steps)


def kit_eleven_points(recall: list[float], precision: list[float]) -> float:
    """The average precision by VOCevaldet.m of 2007."""
    total = 0.0
    for tenths in range(11):
        points = zip(recall, precision, strict=True)
        total += max((p for r, p in points if r >= tenths / 10), default=0.0)
    return total / 11


def random_scenes(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random ground truth and predictions.

    They are crowded and in whole pixels, so that detections compete for objects, scores are equal
    and IoUs are equal to thresholds.
    """
    rng = np.random.default_rng(seed)
    images, predictions = [], []
    for image_id in range(1, 16):
        boxes = rng.integers((0, 0, 6, 6), (50, 50, 30, 30), (8, 4)).tolist()
        labels = rng.choice([2, 5], 8).tolist()
        difficult = (rng.random(8) < 0.3).tolist()
        objects = []
        for box, label, hard in zip(boxes, labels, difficult, strict=True):
            objects.append(thing(0, bbox=box, category_id=label, difficult=int(hard)))
        images.append(objects)
        for row in rng.integers(0, 8, 25):
            box = (np.array(boxes[row]) + rng.integers(-2, 3, 4)).tolist()
            label = labels[row] if rng.random() < 0.7 else int(rng.choice([2, 5, 6]))
            score = float(rng.integers(12))
            predictions.append(seen(0, score, image_id, bbox=box, category_id=label))
    return truth_of(*images), predictions


@pytest.mark.parametrize("seed", range(5))
def test_random_predictions_score_as_the_development_kit_counts(seed: int) -> None:
    truth, predictions = random_scenes(seed)
    areas, eleven = [], []
    for number in (2, 5):
        objects = [item for item in truth["annotations"] if item["category_id"] == number]
        detections = [item for item in predictions if item["category_id"] == number]
        curves = [kit_curve(objects, detections, percent / 100) for percent in range(50, 100, 5)]
        areas.append([kit_area(*curve) for curve in curves])
        eleven.append([kit_eleven_points(*curve) for curve in curves])
    means: list[float] = []
    for by_category in (areas, eleven):
        mean = np.mean(by_category, axis=0)
        means += [mean.mean(), mean[0], mean[5]]
    expected = dict(zip(MEANS, means, strict=True))
    expected |= {"box_ap50/cat": areas[0][0], "box_ap50/dog": areas[1][0]}
    # the third category has predictions only, so it has no metric
    assert voc_metrics(truth, predictions) == pytest.approx(expected, abs=1e-12)


def test_hit_miss_hit_scores_as_counted_by_hand() -> None:
    # recall and precision: 1/2 and 1, 1/2 and 1/2, 1 and 2/3
    truth = truth_of([thing(0)], [thing(0)])
    metrics = voc_metrics(truth, [seen(0, 0.9), seen(50, 0.8), seen(0, 0.7, image_id=2)])
    area, eleven = 1 / 2 + 1 / 2 * 2 / 3, (6 * 1 + 5 * 2 / 3) / 11
    expected = dict(zip(MEANS, [area] * 3 + [eleven] * 3, strict=True)) | {"box_ap50/cat": area}
    assert metrics == pytest.approx(expected)


def test_eleven_points_are_at_recalls_of_exact_tenths() -> None:
    truth = truth_of([thing(20 * index) for index in range(10)])
    metrics = voc_metrics(truth, [seen(20 * index, 0.5) for index in range(3)])
    # a recall of 3/10 counts for the level 0.3, the fourth of the eleven
    assert metrics["box_ap50_11point"] == pytest.approx(4 / 11)


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        pytest.param(
            [seen(0, 0.9), seen(0, 0.8)], 0.5, id="the second detection of a found object is false"
        ),
        pytest.param(
            [seen(0, 0.9), seen(0, 0.8), seen(20, 0.7)], 5 / 6, id="and lowers what comes after"
        ),
        pytest.param(
            [seen(0, 0.9), seen(0, 0.8, bbox=[0, 0, 13, 10])], 0.5, id="so is a worse second"
        ),
        pytest.param(
            [seen(9, 0.9), seen(20, 0.9)], 0.25, id="of equal scores the first comes first, false"
        ),
        pytest.param(
            [seen(20, 0.9), seen(9, 0.9)], 0.5, id="of equal scores the first comes first, true"
        ),
        pytest.param(
            [seen(0, 0.9, image_id=2), seen(20, 0.8)],
            0.25,
            id="an object of another image is not found",
        ),
        pytest.param([seen(0, 0.9, category_id=5)], 0.0, id="nor by another category"),
        pytest.param([seen(0, 0.9, bbox=[0, 0, 10, 5])], 0.5, id="half an object is enough"),
        pytest.param([seen(0, 0.9, bbox=[0, 0, 0, 0])], 0.0, id="an empty box finds nothing"),
        pytest.param([], 0.0, id="no predictions"),
    ],
)
def test_detections_are_counted_by_the_rules(
    predictions: list[dict[str, Any]], expected: float
) -> None:
    truth = truth_of([thing(0), thing(20)], [])
    assert voc_metrics(truth, predictions)["box_ap50"] == pytest.approx(expected)


def test_a_detection_is_compared_with_its_best_object_only() -> None:
    truth = truth_of([thing(0), thing(3)])
    # The second detection has IoU 9/11 with the object matched already and 8/12 with the other one.
    # COCO's rules would match it with the other one.
    assert voc_metrics(truth, [seen(0, 0.9), seen(1, 0.8)])["box_ap50"] == pytest.approx(0.5)


@pytest.mark.parametrize("ignored", [{"difficult": 1}, {"iscrowd": 1}])
@pytest.mark.parametrize(("extra", "expected"), [(0, 0.5), (1, 0.5), (2, 0.5)])
def test_difficult_objects_and_crowds_neither_count_nor_hurt(
    ignored: dict[str, int], extra: int, expected: float
) -> None:
    truth = truth_of([thing(0), thing(20), thing(40, **ignored)])
    metrics = voc_metrics(truth, [seen(0, 0.5)] + [seen(40, 0.9)] * extra)
    assert metrics["box_ap50"] == pytest.approx(expected)


def test_categories_without_objects_or_with_difficult_ones_only_are_left_out() -> None:
    truth = truth_of([thing(0), thing(20, category_id=5, difficult=1)])
    metrics = voc_metrics(
        truth, [seen(0, 0.9), seen(20, 0.9, category_id=5), seen(0, 0.9, category_id=6)]
    )
    assert metrics == dict.fromkeys([*MEANS, "box_ap50/cat"], 1.0)


def test_only_difficult_objects_are_refused() -> None:
    with pytest.raises(ShardError, match="all objects of 1 images are difficult"):
        voc_metrics(truth_of([thing(0, difficult=1)]), [])


def test_predictions_of_unknown_images_are_refused() -> None:
    with pytest.raises(ShardError, match=r"predictions have image_id \[9\]"):
        voc_metrics(truth_of([thing(0)]), [seen(0, 0.9, image_id=9)])


def test_scoring_leaves_its_arguments_as_they_were() -> None:
    truth, predictions = random_scenes(0)
    before = deepcopy([truth, predictions])
    voc_metrics(truth, predictions)
    assert [truth, predictions] == before


def truth_of_set(name: str, test_data: Path, coco_sets: dict[str, Path]) -> dict[str, Any]:
    """The ground truth of a VOC or COCO data set."""
    if name == "bccd":
        source = open_source([str(test_data / name)], "train")
        images = (
            (index, 480, 640, image.annotations or []) for index, image in enumerate(source.items)
        )
        return ground_truth_of(images, source.categories)
    content: dict[str, Any] = json.loads((coco_sets[name] / SETS[name]).read_text())
    return content


SETS = {
    "sparse": "instances_val.json",
    "dsb2018": "instances_val.json",
    "polygons": "instances_all.json",
}


@pytest.mark.parametrize("name", ["bccd", *SETS])
def test_ground_truth_as_predictions_scores_one_in_all_metrics(
    name: str, test_data: Path, coco_sets: dict[str, Path]
) -> None:
    truth = truth_of_set(name, test_data, coco_sets)
    metrics = voc_metrics(truth, [item | {"score": 0.9} for item in truth["annotations"]])
    assert len(metrics) > len(MEANS)
    assert metrics == dict.fromkeys(metrics, pytest.approx(1.0))


def test_shuffled_labels_score_nearly_zero(test_data: Path, coco_sets: dict[str, Path]) -> None:
    truth = truth_of_set("sparse", test_data, coco_sets)
    labels = [item["category_id"] for item in truth["annotations"]]
    shuffled = np.random.default_rng(0).permutation(labels).tolist()
    rows = zip(truth["annotations"], shuffled, strict=True)
    predictions = [item | {"score": 0.9, "category_id": label} for item, label in rows]
    metrics = voc_metrics(truth, predictions)
    assert metrics["box_ap50"] < 0.05 and metrics["box_ap"] < 0.05
