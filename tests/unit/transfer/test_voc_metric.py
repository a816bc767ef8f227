"""VOC's average precision: as a slow walk through the development kit's rules has it, and as counted by hand."""

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
    """VOCevaldet.m: widths of boxes that include both their corners."""
    a, b = corners(first), corners(second)
    wide, high = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    if wide <= 0 or high <= 0:
        return 0.0
    sizes = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return wide * high / (sum(sizes) - wide * high)


def kit_curve(
    objects: list[dict[str, Any]], found: list[dict[str, Any]], threshold: float
) -> tuple[list[float], list[float]]:
    """VOCevaldet.m for one class, one detection after the other."""
    by_image = defaultdict(list)
    for item in objects:
        by_image[item["image_id"]].append(item)
    taken: set[int] = set()
    positives = sum(not item["difficult"] for item in objects)
    true = false = 0
    recall, precision = [], []
    for item in sorted(found, key=lambda item: item["score"], reverse=True):
        most, match = -1.0, None
        for candidate in by_image[item["image_id"]]:
            overlap = kit_overlap(candidate["bbox"], item["bbox"])
            if overlap > most:
                most, match = overlap, candidate
        if match is None or most < threshold or match["id"] in taken:
            false += 1
        elif not match["difficult"]:
            taken.add(match["id"])
            true += 1
        if true + false:
            recall.append(true / positives)
            precision.append(true / (true + false))
    return recall, precision


def kit_area(recall: list[float], precision: list[float]) -> float:
    """VOCap.m."""
    recalls, precisions = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for place in range(len(precisions) - 2, -1, -1):
        precisions[place] = max(precisions[place], precisions[place + 1])
    steps = zip(recalls, recalls[1:], precisions[1:], strict=False)
    return sum((after - before) * height for before, after, height in steps)


def kit_eleven_points(recall: list[float], precision: list[float]) -> float:
    """VOCevaldet.m of 2007."""
    levels = [place / 10 for place in range(11)]
    best = [
        max((p for r, p in zip(recall, precision, strict=True) if r >= level), default=0.0)
        for level in levels
    ]
    return sum(best) / 11


def random_scenes(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Whole pixels, crowded, so that boxes share objects, scores are equal and IoUs meet thresholds."""
    rng = np.random.default_rng(seed)
    images, predictions = [], []
    for image_id in range(1, 16):
        boxes = rng.integers((0, 0, 6, 6), (50, 50, 30, 30), (8, 4)).tolist()
        labels = rng.choice([2, 5], 8).tolist()
        hard = (rng.random(8) < 0.3).tolist()
        rows = zip(boxes, labels, hard, strict=True)
        images.append(
            [thing(0, bbox=box, category_id=label, difficult=int(d)) for box, label, d in rows]
        )
        for place in rng.integers(0, 8, 25):
            box = (np.array(boxes[place]) + rng.integers(-2, 3, 4)).tolist()
            label = labels[place] if rng.random() < 0.7 else int(rng.choice([2, 5, 6]))
            predictions.append(
                seen(0, float(rng.integers(12)), image_id, bbox=box, category_id=label)
            )
    return truth_of(*images), predictions


@pytest.mark.parametrize("seed", range(5))
def test_random_predictions_score_as_the_development_kit_counts(seed: int) -> None:
    truth, predictions = random_scenes(seed)
    areas, eleven = [], []
    for number in (2, 5):
        objects = [item for item in truth["annotations"] if item["category_id"] == number]
        found = [item for item in predictions if item["category_id"] == number]
        curves = [kit_curve(objects, found, percent / 100) for percent in range(50, 100, 5)]
        areas.append([kit_area(*curve) for curve in curves])
        eleven.append([kit_eleven_points(*curve) for curve in curves])
    means = [
        value
        for kind in (areas, eleven)
        for m in [np.mean(kind, axis=0)]
        for value in (m.mean(), m[0], m[5])
    ]
    expected = dict(zip(MEANS, means, strict=True))
    expected |= {"box_ap50/cat": areas[0][0], "box_ap50/dog": areas[1][0]}
    # the third category has predictions only
    assert voc_metrics(truth, predictions) == pytest.approx(expected, abs=1e-12)


def test_hit_miss_hit_scores_as_counted_by_hand() -> None:
    # recall and precision: 1/2 and 1, 1/2 and 1/2, 1 and 2/3
    metrics = voc_metrics(
        truth_of([thing(0)], [thing(0)]), [seen(0, 0.9), seen(50, 0.8), seen(0, 0.7, image_id=2)]
    )
    area, eleven = 1 / 2 + 1 / 2 * 2 / 3, (6 * 1 + 5 * 2 / 3) / 11
    assert metrics == pytest.approx(
        dict(zip(MEANS, [area] * 3 + [eleven] * 3, strict=True)) | {"box_ap50/cat": area}
    )


def test_eleven_points_are_at_recalls_of_exact_tenths() -> None:
    truth = truth_of([thing(20 * place) for place in range(10)])
    # recall 3/10 is met by the level 0.3
    assert voc_metrics(truth, [seen(20 * place, 0.5) for place in range(3)])[
        "box_ap50_11point"
    ] == pytest.approx(4 / 11)


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


def test_a_detection_does_not_turn_to_its_second_best_object() -> None:
    truth = truth_of([thing(0), thing(3)])
    # the second has IoU 9/11 with the found object and 8/12 with the free one; COCO would match it with that
    assert voc_metrics(truth, [seen(0, 0.9), seen(1, 0.8)])["box_ap50"] == pytest.approx(0.5)


@pytest.mark.parametrize("ignored", [{"difficult": 1}, {"iscrowd": 1}])
@pytest.mark.parametrize(("extra", "expected"), [(0, 0.5), (1, 0.5), (2, 0.5)])
def test_difficult_objects_and_crowds_neither_count_nor_hurt(
    ignored: dict[str, int], extra: int, expected: float
) -> None:
    truth = truth_of([thing(0), thing(20), thing(40, **ignored)])
    assert voc_metrics(truth, [seen(0, 0.5)] + [seen(40, 0.9)] * extra)[
        "box_ap50"
    ] == pytest.approx(expected)


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
    """The ground truth of a data set, VOC or COCO."""
    if name == "bccd":
        source = open_source([str(test_data / name)], "train")
        images = (
            (place, 480, 640, image.annotations or []) for place, image in enumerate(source.items)
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
    labels = (
        np.random.default_rng(0)
        .permutation([item["category_id"] for item in truth["annotations"]])
        .tolist()
    )
    rows = zip(truth["annotations"], labels, strict=True)
    metrics = voc_metrics(
        truth, [item | {"score": 0.9, "category_id": label} for item, label in rows]
    )
    assert metrics["box_ap50"] < 0.05 and metrics["box_ap"] < 0.05
