"""Data sets that tests draw: class folders like CIFAR-10's, and COCO JSON as in real data sets.

They stand in for CIFAR-10 and COCO, whose photos may not be distributed with this repository.
"""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_ABSENT = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
SPARSE_IDS = tuple(number for number in range(1, 91) if number not in _ABSENT)
"""The 80 category ids of COCO, which omit ten of 1 to 90."""
_HEIGHT, _WIDTH = 240, 320


def write_class_zip(path: Path, split: str, *, per_class: int, seed: int) -> Path:
    """Writes `<split>/<class>/<nnnn>.jpg` of 32 x 32 pixels into a zip archive.

    All images of a class have its tint, and each has its own pattern.
    """
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive:
        for label, name in enumerate(CLASSES):
            tint = np.array([25 * label, 250 - 25 * label, 60 * (label % 4)])
            noise = rng.integers(0, 256, (per_class, 8, 8, 3))
            patterns = (0.4 * tint + 0.6 * noise).astype(np.uint8)
            for number, pattern in enumerate(patterns):
                buffer = io.BytesIO()
                Image.fromarray(pattern).resize((32, 32), Image.Resampling.BILINEAR).save(
                    buffer, "jpeg"
                )
                archive.writestr(f"{split}/{name}/{number:04d}.jpg", buffer.getvalue())
    return path


def write_sparse_coco(folder: Path) -> Path:
    """Writes splits `train` and `val` with COCO's sparse ids.

    Objects are small to large and may have several parts, crowds are uncompressed runs, and some
    images have no objects.
    """
    rng = np.random.default_rng(0)
    categories = [{"id": number, "name": f"thing {number}"} for number in SPARSE_IDS]
    for split, first in (("train", 1000), ("val", 5000)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for place in range(24):
            image_id = first + 7 * place
            count = 0 if place == 5 else int(rng.integers(5, 15))
            objects = [_outlined(rng, smallest=5, largest=100) for _ in range(count)]
            if place % 4 == 0:
                objects.append(_crowd(rng))
            for item in objects:
                item |= {"id": 31 * len(annotations) + first, "image_id": image_id}
                item["category_id"] = int(rng.choice(SPARSE_IDS))
                annotations.append(item)
            name = f"{image_id:012d}.jpg"
            _draw(rng, objects).save(folder / split / name)
            images.append(_described(image_id, name) | {"license": 1})
        content = {
            "info": {"description": "drawn by tests"},
            "licenses": [{"id": 1, "name": "none needed"}],
        }
        content |= {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def write_polygon_coco(folder: Path) -> Path:
    """Writes one set without a split, with image ids from 0.

    It has medium and large objects of 3 categories, as polygons only. Objects do not overlap and
    each category has its colour, so a detector can learn them in few steps.
    """
    rng = np.random.default_rng(1)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(18):
        objects: list[dict[str, Any]] = []
        for _ in range(30):
            item = _outlined(rng, smallest=32, largest=75)
            if not any(_touch(item["bbox"], other["bbox"]) for other in objects):
                objects.append(item)
        for number, item in enumerate(objects):
            item |= {"id": len(annotations), "image_id": image_id, "category_id": number % 3 + 1}
            annotations.append(item)
        name = f"{image_id}.jpg"
        _draw(rng, objects).save(folder / "images" / name)
        images.append(_described(image_id, name))
    categories = [
        {"id": number, "name": name} for number, name in enumerate(("date", "fig", "hazelnut"), 1)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances_all.json").write_text(json.dumps(content))
    return folder


def _described(image_id: int, name: str) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "height": _HEIGHT, "width": _WIDTH}


def _touch(first: list[float], second: list[float]) -> bool:
    """Returns whether two boxes [x, y, width, height] overlap."""
    return all(
        first[axis] < second[axis] + second[axis + 2]
        and second[axis] < first[axis] + first[axis + 2]
        for axis in (0, 1)
    )


def _outlined(rng: np.random.Generator, *, smallest: float, largest: float) -> dict[str, Any]:
    """Returns an object of one or two polygons, with the box and the area of their corners."""
    radius = float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
    parts = [_polygon(rng, radius)]
    if rng.random() < 0.2:
        parts.append(_polygon(rng, radius))
    corners = np.concatenate(parts)
    low, high = corners.min(axis=0), corners.max(axis=0)
    x, y = low.tolist()
    width, height = (high - low).round(2).tolist()
    return {
        "segmentation": [part.ravel().tolist() for part in parts],
        "bbox": [x, y, width, height],
        "area": sum(_enclosed(part) for part in parts),
        "iscrowd": 0,
    }


def _polygon(rng: np.random.Generator, radius: float) -> NDArray[np.float64]:
    """Returns corners (P, 2) around a point of the image, all inside the image."""
    angles = np.linspace(0, 2 * np.pi, int(rng.integers(7, 16)), endpoint=False)
    distances = radius * rng.uniform(0.8, 1.2, len(angles))
    centre = rng.uniform((radius, radius), (_WIDTH - radius, _HEIGHT - radius))
    corners = centre + distances[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return corners.clip(0, (_WIDTH, _HEIGHT)).round(2)


def _enclosed(corners: NDArray[np.float64]) -> float:
    """Returns the area by the shoelace formula."""
    (x, y), (next_x, next_y) = corners.T, np.roll(corners, -1, axis=0).T
    return abs(float((x * next_y - next_x * y).sum())) / 2


def _crowd(rng: np.random.Generator) -> dict[str, Any]:
    """Returns a crowd that fills an ellipse.

    Its mask is uncompressed runs down the columns, of which the first is outside.
    """
    centre_x, centre_y = rng.uniform((60, 60), (_WIDTH - 60, _HEIGHT - 60))
    rows, columns = np.ogrid[:_HEIGHT, :_WIDTH]
    inside = ((columns - centre_x) / 55) ** 2 + ((rows - centre_y) / 35) ** 2 <= 1
    runs, value = [0], False
    for pixel in inside.ravel(order="F").tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    y, x = np.nonzero(inside)
    return {
        "segmentation": {"size": [_HEIGHT, _WIDTH], "counts": runs},
        "bbox": [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1],
        "area": int(inside.sum()),
        "iscrowd": 1,
    }


def _draw(rng: np.random.Generator, objects: list[dict[str, Any]]) -> Image.Image:
    """Draws objects, each in the colour of its category, on a dull background."""
    coarse = rng.integers(60, 120, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((_WIDTH, _HEIGHT), Image.Resampling.BILINEAR)
    canvas = ImageDraw.Draw(image)
    for item in objects:
        # the golden angle: far from the colour of the next id
        colour = f"hsv({137.5 * item['category_id'] % 360:.0f}, 85%, 95%)"
        if item["iscrowd"]:
            x, y, width, height = item["bbox"]
            canvas.ellipse((x, y, x + width, y + height), colour)
        else:
            for part in item["segmentation"]:
                canvas.polygon(part, colour)
    return image
