"""The demo's images, drawn from scikit-learn's 1,797 scanned digits; no network is needed.

The scans have 8 x 8 pixels. They are divided between training and test before anything is drawn, so
that no test digit is in a training image. Each is drawn several times, rotated, scaled, shifted and
coloured, on a textured background with strokes of clutter, so that raw pixels do not suffice to
tell digits apart. The same seed gives the same files.

Shapes: S is the side of an image in pixels.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval import mask as rle
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample, interpolate

Floats = NDArray[np.floating[Any]]

_SPLITS = ("train", "test")
_TEST_SHARE = 0.3  # of the digits of each class
_DIGIT_SIDE = 32
_RENDERINGS = {"train": 4, "test": 2}
_SCENE_SIDE = 96
_SCENES = {"train": 240, "test": 60}
_MIN_VISIBLE_PIXELS = 20


class Digit(NamedTuple):
    """A scanned digit."""

    ink: Floats
    """(8, 8) in [0, 1]."""
    label: int


def split_digits(seed: int) -> dict[str, list[Digit]]:
    """Divides the scanned digits into splits, with the same share of each class."""
    from sklearn.datasets import load_digits  # imported late: it takes seconds

    scans, labels = load_digits(return_X_y=True)
    inks = (scans / 16).reshape(-1, 8, 8).astype(np.float32)
    rng = np.random.default_rng([seed, 0])
    digits: dict[str, list[Digit]] = {split: [] for split in _SPLITS}
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        test_count = round(_TEST_SHARE * len(members))
        for position, index in enumerate(members):
            split = "test" if position < test_count else "train"
            digits[split].append(Digit(inks[index], label))
    return digits


def write_digits(folder: Path, seed: int) -> None:
    """Writes class folders `<split>/<digit>/*.png` of images of 32 x 32 pixels."""
    for number, (split, digits) in enumerate(split_digits(seed).items()):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True, exist_ok=True)
        for index, digit in enumerate(digits):
            for rendering in range(_RENDERINGS[split]):
                rng = np.random.default_rng([seed, 1, number, index, rendering])
                path = folder / split / str(digit.label) / f"{index:04d}_{rendering}.png"
                _save(_draw_digit(digit, rng), path)


def write_scenes(folder: Path, seed: int) -> None:
    """Writes a COCO folder of scenes with several digits each, of 96 x 96 pixels.

    The folder has `<split>/*.png` and `instances_<split>.json`.
    """
    categories = [{"id": label + 1, "name": str(label)} for label in range(10)]
    for number, (split, digits) in enumerate(split_digits(seed).items()):
        (folder / split).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, _SCENES[split] + 1):
            name = f"{image_id:04d}.png"
            scene, objects = _draw_scene(digits, np.random.default_rng([seed, 2, number, image_id]))
            _save(scene, folder / split / name)
            images.append(
                {"id": image_id, "file_name": name, "width": _SCENE_SIDE, "height": _SCENE_SIDE}
            )
            for item in objects:
                annotations.append(item | {"id": len(annotations) + 1, "image_id": image_id})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))


def _draw_digit(digit: Digit, rng: np.random.Generator) -> Floats:
    """Draws an image (S, S, 3) of one digit near the middle."""
    ground, colour = _colours(rng)
    image = _ground(_DIGIT_SIDE, ground, rng)
    side = rng.uniform(22, 30)
    centre = 16 + rng.uniform(-2, 2, size=2)
    alpha = _coverage(digit.ink, _DIGIT_SIDE, side=side, centre=centre, rng=rng)
    return _paint(image, alpha, colour)


def _draw_scene(
    digits: list[Digit], rng: np.random.Generator
) -> tuple[Floats, list[dict[str, Any]]]:
    """Draws an image (S, S, 3) of several digits.

    Returns:
        The image, and its COCO annotations without ids. A mask covers what is visible of a digit.
    """
    ground, _ = _colours(rng)
    image = _ground(_SCENE_SIDE, ground, rng)
    visible: list[tuple[int, NDArray[np.bool_]]] = []
    for centre in _centres(rng):
        digit = digits[rng.integers(len(digits))]
        side = rng.uniform(24, 36)
        alpha = _coverage(digit.ink, _SCENE_SIDE, side=side, centre=centre, rng=rng)
        image = _paint(image, alpha, _contrasting(ground, rng))
        mask = alpha > 0.5
        # the new digit lies over the earlier ones
        visible = [(label, earlier & ~mask) for label, earlier in visible]
        visible.append((digit.label, mask))
    annotations = [
        _annotation(label, mask) for label, mask in visible if mask.sum() >= _MIN_VISIBLE_PIXELS
    ]
    return image, annotations


def _centres(rng: np.random.Generator) -> list[Floats]:
    """Draws the centres of 3 to 6 digits: jittered cells of a 3 x 3 grid, for little overlap."""
    cells = rng.choice(9, size=rng.integers(3, 7), replace=False)
    pitch = _SCENE_SIDE / 3
    return [
        (np.array([cell % 3, cell // 3]) + 0.5) * pitch + rng.uniform(-4, 4, size=2)
        for cell in cells
    ]


def _annotation(label: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "category_id": label + 1,
        "bbox": [float(value) for value in rle.toBbox(encoded)],
        "area": float(rle.area(encoded)),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": encoded["counts"].decode()},
    }


def _coverage(
    ink: Floats, size: int, *, side: float, centre: Floats, rng: np.random.Generator
) -> Floats:
    """Computes how much of each pixel of a canvas (S, S) a digit covers, in [0, 1].

    The digit is rotated by up to 20 degrees either way.

    Args:
        ink: the scan, (8, 8).
        size: S.
        side: side of the scan's square on the canvas, in pixels.
        centre: x and y of the square's centre, in pixels.
        rng: draws the angle and the aspect ratio.
    """
    angle, aspect = np.deg2rad(rng.uniform(-20, 20)), rng.uniform(0.85, 1.15)
    width, height = side * aspect, side / aspect
    # affine_grid wants the map from points of the canvas to points of the scan, both in [-1, 1]
    rotation = np.array(
        [
            [np.cos(angle) / width, np.sin(angle) / width],
            [-np.sin(angle) / height, np.cos(angle) / height],
        ]
    )
    shift = -(rotation * 2) @ (np.asarray(centre) - size / 2)
    matrix = np.column_stack([rotation * size, shift]).astype(np.float32)  # (2, 3)
    grid = affine_grid(torch.from_numpy(matrix)[None], [1, 1, size, size], align_corners=False)
    scan = torch.from_numpy(ink)[None, None]  # (1, 1, 8, 8)
    drawn = grid_sample(scan, grid, mode="bicubic", align_corners=False)[0, 0]  # (S, S)
    # the steep ramp keeps strokes crisp although the scan is coarse
    return (drawn.sub(0.35).mul(4).clamp(0, 1)).numpy()


def _ground(size: int, colour: Floats, rng: np.random.Generator) -> Floats:
    """Draws a background (S, S, 3): a smooth drift of colour, thin strokes and grain."""
    cells = max(3, size // 8)
    drift = _upscale(rng.normal(0, 0.04, (cells, cells, 3)), size)
    strokes = np.zeros((size, size), np.float32)
    for _ in range(size // 12):
        strokes = np.maximum(strokes, _stroke(size, rng))
    tint = rng.uniform(-0.2, 0.2, 3)
    grain = rng.normal(0, 0.03, (size, size, 3))
    return np.clip(colour + drift + grain + strokes[..., None] * tint, 0, 1).astype(np.float32)


def _stroke(size: int, rng: np.random.Generator) -> Floats:
    """Draws a short straight stroke (S, S) in [0, 1]."""
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    x, y = rng.uniform(0, size, 2)
    angle, length = rng.uniform(0, np.pi), rng.uniform(3, 7)
    along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
    distance = np.hypot(np.maximum(np.abs(along) - length, 0), across)
    stroke: Floats = np.clip(1.5 - distance, 0, 1).astype(np.float32)
    return stroke


def _upscale(cells: NDArray[np.float64], size: int) -> Floats:
    """Scales (cells, cells, 3) to (S, S, 3)."""
    small = torch.from_numpy(cells.astype(np.float32)).permute(2, 0, 1)
    small = small[None]  # (1, 3, cells, cells)
    large = interpolate(small, (size, size), mode="bicubic", align_corners=False)  # (1, 3, S, S)
    image: Floats = large[0].permute(1, 2, 0).numpy()  # (S, S, 3)
    return image


def _colours(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Draws a background colour, and an ink colour that is visible on it."""
    ground = rng.uniform(0, 0.6, 3).astype(np.float32)
    return ground, _contrasting(ground, rng)


def _contrasting(ground: Floats, rng: np.random.Generator) -> Floats:
    """Draws a colour that is brighter than the background by at least 0.25."""
    while True:
        colour = rng.uniform(0.2, 1, 3).astype(np.float32)
        if float(colour.mean() - ground.mean()) >= 0.25:
            return colour


def _paint(image: Floats, alpha: Floats, colour: Floats) -> Floats:
    """Blends a colour into an image (S, S, 3) by the weights alpha (S, S)."""
    return image + alpha[..., None] * (colour - image)


def _save(image: Floats, path: Path) -> None:
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(path)
