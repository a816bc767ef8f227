"""Scenes with their objects drawn in: ground truth to the left, predictions to the right.

Shapes: H x W an image.
"""

import colorsys
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from hemoco.transfer.detection.coco_metric import decode_mask

_SHORTER_SIDE = 288  # of a drawn scene, pixels
_GAP = 4


def draw_scenes(
    scenes: list[tuple[Tensor, list[dict[str, Any]], int]],
    predictions: list[dict[str, Any]],
    names: dict[int, str],
) -> bytes:
    """A PNG, one row per scene; a white pixel if there is none. Objects without a mask are drawn as boxes alone.

    Args:
        scenes: uint8 image (3, H, W), COCO annotations and image id of each.
        predictions: COCO results, those of other images included.
        names: of the categories by their id.
    """
    rows = []
    for image, annotations, image_id in scenes:
        found = [item for item in predictions if item["image_id"] == image_id]
        rows.append((_draw(image, annotations, names), _draw(image, found, names)))
    width = max((2 * truth.width + _GAP for truth, _ in rows), default=1)
    height = max(sum(truth.height + _GAP for truth, _ in rows) - _GAP, 1)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for truth, predicted in rows:
        sheet.paste(truth, (0, top))
        sheet.paste(predicted, (truth.width + _GAP, top))
        top += truth.height + _GAP
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _draw(image: Tensor, objects: list[dict[str, Any]], names: dict[int, str]) -> Image.Image:
    """The image enlarged, with masks, boxes, labels and, where there are, scores."""
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32)  # (H, W, 3)
    colours = [_colour(place, len(objects)) for place in range(len(objects))]
    masked = [
        (item, colour)
        for item, colour in zip(objects, colours, strict=True)
        if item.get("segmentation")
    ]
    for item, colour in masked:
        mask = decode_mask(item["segmentation"], height, width).astype(bool)
        pixels[mask] = 0.4 * pixels[mask] + 0.6 * np.array(colour)
    scale = _SHORTER_SIDE / min(height, width)
    drawn = Image.fromarray(pixels.astype(np.uint8)).resize(
        (round(width * scale), round(height * scale))
    )
    pen = ImageDraw.Draw(drawn)
    for item, colour in zip(objects, colours, strict=True):
        left, top, wide, high = (side * scale for side in item["bbox"])
        pen.rectangle((left, top, left + wide, top + high), outline=colour, width=2)
        text = names[item["category_id"]] + (f" {item['score']:.2f}" if "score" in item else "")
        pen.text((left + 3, top + 1), text, fill="white", stroke_width=1, stroke_fill="black")
    return drawn


def _colour(place: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(place / count, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
