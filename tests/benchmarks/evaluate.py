"""Cost of COCO evaluation, and whether it is right; takes some minutes.

    uv run python tests/benchmarks/evaluate.py

hemoco's `coco_metrics` beside stock pycocotools on the same synthetic scenes, from lists of COCO
annotations and results to all average precisions. Images are of COCO's size with its 80 categories,
7 objects and 100 predictions each; the predictions scatter about the objects, a third with any
label. Masks are ellipses: polygons as ground truth, compressed RLE as predictions.

The evaluators take turns, round by round, and the order turns too, so that a busy machine slows all
of them. Times are CPU-seconds of one thread on one core. A ratio is that of a round; given are the
median and the range over the rounds. pycocotools gets copies of the scenes, made before its time
begins, for it writes into them; ours makes its own. It is spared what it does beside (AR at 1 and
10 detections, the printed summary).

torchmetrics takes part with boxes where it can be imported: `uv run --with torchmetrics`. Its masks
would have to be dense, 31 MB per image. Its levels of recall are float32, so recall of exactly 0.6
misses its level and its AP comes out some 1e-4 lower; with levels in float64 it agrees to 1e-7.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import statistics
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from machine import describe_machine, table
from pycocotools import mask as stock_rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hemoco.transfer.detection.coco_metric import coco_metrics, ground_truth_of

HEIGHT, WIDTH, CATEGORIES, OBJECTS, DETECTIONS = 480, 640, 80, 7, 100
KINDS = {"bbox": "box", "segm": "mask"}
Metrics = dict[str, float]
Scenes = tuple[dict[str, Any], list[dict[str, Any]]]


def polygon(box: Sequence[float]) -> list[list[float]]:
    """An ellipse of 24 points within a box."""
    left, top, wide, high = box
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.stack(
        [left + wide / 2 * (1 + np.cos(angles)), top + high / 2 * (1 + np.sin(angles))], axis=1
    )
    return [points.round(2).ravel().tolist()]


def compressed(box: Sequence[float]) -> dict[str, Any]:
    """The ellipse as a detector's mask comes."""
    encoded: dict[str, Any] = stock_rle.frPyObjects(polygon(box), HEIGHT, WIDTH)[0]
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def make_scenes(images: int) -> Scenes:
    """Ground truth and predictions."""
    rng = np.random.default_rng(0)
    truth, predictions = [], []
    for image_id in range(images):
        sides = np.exp(rng.uniform(np.log(12), np.log(300), (OBJECTS, 2)))
        boxes = np.concatenate([rng.uniform(0, (WIDTH, HEIGHT) - sides), sides], axis=1)
        labels, crowds = (
            rng.integers(1, CATEGORIES + 1, OBJECTS).tolist(),
            (rng.random(OBJECTS) < 0.02).tolist(),
        )
        rows = zip(boxes.tolist(), labels, crowds, strict=True)
        objects = [
            {
                "category_id": label,
                "bbox": box,
                "area": np.pi / 4 * box[2] * box[3],
                "iscrowd": int(crowd),
            }
            | {"segmentation": polygon(box)}
            for box, label, crowd in rows
        ]
        truth.append((image_id, HEIGHT, WIDTH, objects))
        for place in rng.integers(0, OBJECTS, DETECTIONS):
            box = (
                (boxes[place] + rng.normal(0, 0.08, 4) * boxes[place][[2, 3, 2, 3]])
                .clip(1)
                .tolist()
            )
            label = labels[place] if rng.random() < 2 / 3 else int(rng.integers(1, CATEGORIES + 1))
            found = {
                "image_id": image_id,
                "category_id": label,
                "bbox": box,
                "score": float(rng.random()),
            }
            predictions.append(found | {"segmentation": compressed(box)})
    categories = [{"id": number, "name": f"{number}"} for number in range(1, CATEGORIES + 1)]
    return ground_truth_of(truth, categories), predictions


def by_hemoco(scenes: Scenes, kinds: Sequence[str]) -> tuple[float, Metrics]:
    """CPU-seconds and metrics."""
    begun = time.process_time()
    metrics = coco_metrics(*scenes, masks="segm" in kinds, max_detections=DETECTIONS)
    return time.process_time() - begun, metrics


def by_pycocotools(scenes: Scenes, kinds: Sequence[str]) -> tuple[float, Metrics]:
    """CPU-seconds and metrics."""
    truth, predictions = deepcopy(scenes)
    # with a box, a mask's area would be that of the box
    without_boxes = deepcopy(predictions)
    for item in without_boxes:
        item.pop("bbox", None)
    results = {kind: predictions if kind == "bbox" else without_boxes for kind in kinds}
    metrics: Metrics = {}
    begun = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        stock = COCO()
        stock.dataset = truth
        stock.createIndex()
        for kind in kinds:
            evaluation = COCOeval(stock, stock.loadRes(results[kind]), kind)
            evaluation.params.maxDets = [DETECTIONS]
            evaluation.evaluate()
            evaluation.accumulate()
            metrics |= family(
                KINDS[kind], evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0]
            )
    return time.process_time() - begun, metrics


def family(prefix: str, precision: Any, recall: Any) -> Metrics:
    """Means of precision (10, 101, K, 4) and recall (10, K, 4), of what occurs."""
    curves = {
        "ap": precision[..., 0],
        "ap50": precision[0, ..., 0],
        "ap75": precision[5, ..., 0],
        "ar": recall[..., 0],
    }
    curves |= {
        f"ap_{name}": precision[..., place]
        for place, name in enumerate(("small", "medium", "large"), 1)
    }
    curves |= {f"ap/{place + 1}": precision[:, :, place, 0] for place in range(precision.shape[2])}
    known = {name: curve[curve > -1] for name, curve in curves.items()}
    return {f"{prefix}_{name}": float(curve.mean()) for name, curve in known.items() if curve.size}


def by_torchmetrics(scenes: Scenes, kinds: Sequence[str]) -> tuple[float, Metrics]:
    """CPU-seconds and metrics of boxes, tensors made before."""
    from torchmetrics.detection import MeanAveragePrecision

    truth, predictions = scenes

    def tensors(
        items: list[dict[str, Any]], **fields: tuple[str, torch.dtype]
    ) -> list[dict[str, torch.Tensor]]:
        by_image: list[list[dict[str, Any]]] = [[] for _ in truth["images"]]
        for item in items:
            by_image[item["image_id"]].append(item)
        images = []
        for some in by_image:
            image = {}
            for name, (key, kind) in fields.items():
                image[name] = torch.tensor([item[key] for item in some], dtype=kind)
            images.append(image)
        return images

    shared = {"boxes": ("bbox", torch.float64), "labels": ("category_id", torch.int64)}
    found = tensors(predictions, scores=("score", torch.float64), **shared)
    known = tensors(
        truth["annotations"],
        iscrowd=("iscrowd", torch.int64),
        area=("area", torch.float64),
        **shared,
    )
    begun = time.process_time()
    metric = MeanAveragePrecision(box_format="xywh", max_detection_thresholds=[1, 10, DETECTIONS])
    metric.warn_on_many_detections = False
    metric.update(found, known)
    result = metric.compute()
    spent = time.process_time() - begun
    names = {"ap": "map", "ap50": "map_50", "ap75": "map_75", "ar": f"mar_{DETECTIONS}"}
    return spent, {f"box_{ours}": float(result[theirs]) for ours, theirs in names.items()}


EVALUATORS = {"hemoco": by_hemoco, "pycocotools": by_pycocotools, "torchmetrics": by_torchmetrics}


def report(
    title: str, scenes: Scenes, kinds: Sequence[str], rounds: int, names: Sequence[str]
) -> str:
    """A table of evaluators in turn."""
    turns: list[dict[str, tuple[float, Metrics]]] = []
    for turn in range(rounds):
        order = names if turn % 2 else names[::-1]
        turns.append({name: EVALUATORS[name](scenes, kinds) for name in order})
    rows = []
    for name in names:
        ratios = [found[name][0] / found["hemoco"][0] for found in turns]
        spent = statistics.median(found[name][0] for found in turns)
        ours, theirs = turns[0]["hemoco"][1], turns[0][name][1]
        apart = max(abs(ours[key] - value) for key, value in theirs.items())
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((name, spent, statistics.median(ratios), spread, len(theirs), f"{apart:.1e}"))
    columns = ("evaluator", "CPU-s", "/ hemoco", "range", "metrics", "largest difference")
    return table(title, columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    packages = ["faster-coco-eval", "pycocotools", "numpy"]
    boxes = ["hemoco", "pycocotools"]
    if importlib.util.find_spec("torchmetrics"):
        packages.append("torchmetrics")
        boxes.append("torchmetrics")
    else:
        print("gap: torchmetrics: not importable")
    scenes = make_scenes(options.images)
    objects = len(scenes[0]["annotations"])
    size = f"{options.images} images, {objects:,} objects, {len(scenes[1]):,} predictions"
    print(
        describe_machine(packages, f"{size}; one thread on one core; {options.rounds} rounds"),
        flush=True,
    )
    print(report("Boxes", scenes, ["bbox"], options.rounds, boxes), flush=True)
    print(
        report(
            "Boxes and masks", scenes, ["bbox", "segm"], options.rounds, ["hemoco", "pycocotools"]
        )
    )
    print(describe_machine(["faster-coco-eval"], "at the end"))


if __name__ == "__main__":
    main()
