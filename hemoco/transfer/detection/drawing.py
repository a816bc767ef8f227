"""Pictures of detections: ground truth on the left, predictions on the right.

Shapes: images are H x W pixels.
"""

import colorsys
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from hemoco.transfer.detection.coco_metric import decode_mask

_SHORTER_SIDE = 288  # pixels, of a drawn image
_GAP = 4  # pixels between two drawn images


def draw_scenes(
    scenes: list[tuple[Tensor, list[dict[str, Any]], int]],
    predictions: list[dict[str, Any]],
    names: dict[int, str],
) -> bytes:
    """Draws one row per scene and returns a PNG; without scenes it is one white pixel.

    Objects without a mask are drawn as boxes only.

    Args:
        scenes: uint8 image (3, H, W), COCO annotations and image id of each scene.
        predictions: COCO results, which may include other images.
        names: category names by id.
    """
    rows = []
    for image, annotations, image_id in scenes:
        predicted = [item for item in predictions if item["image_id"] == image_id]
        rows.append((_draw(image, annotations, names), _draw(image, predicted, names)))
    width = max((2 * truth.width + _GAP for truth, _ in rows), default=1)
    height = max(sum(truth.height + _GAP for truth, _ in rows) - _GAP, 1)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for truth, prediction in rows:
        sheet.paste(truth, (0, top))
        sheet.paste(prediction, (truth.width + _GAP, top))
        top += truth.height + _GAP
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _draw(image: Tensor, objects: list[dict[str, Any]], names: dict[int, str]) -> Image.Image:
    """The enlarged image with masks, boxes, labels and, for predictions, scores."""
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32)  # (H, W, 3)
    colours = [_colour(index, len(objects)) for index in range(len(objects))]
    for item, colour in zip(objects, colours, strict=True):
        if item.get("segmentation"):
            mask = decode_mask(item["segmentation"], height, width).astype(bool)  # (H, W)
            pixels[mask] = 0.4 * pixels[mask] + 0.6 * np.array(colour)
    scale = _SHORTER_SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    picture = Image.fromarray(pixels.astype(np.uint8)).resize(size)
    pen = ImageDraw.Draw(picture)
    for item, colour in zip(objects, colours, strict=True):
        left, top, box_width, box_height = (side * scale for side in item["bbox"])
        box = (left, top, left + box_width, top + box_height)
        pen.rectangle(box, outline=colour, width=2)
        text = names[item["category_id"]]
        if "score" in item:
            text += f" {item['score']:.2f}"
        pen.text((left + 3, top + 1), text, fill="white", stroke_width=1, stroke_fill="black")
    return picture


def _colour(index: int, count: int) -> tuple[int, int, int]:
    """One of `count` evenly spaced hues, as RGB."""
    red, green, blue = colorsys.hsv_to_rgb(index / count, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
