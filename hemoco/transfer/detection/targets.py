"""Training targets in the form of torchvision's detectors, scaled and mirrored with their image.

Shapes: images are H x W pixels with D objects.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hemoco.transfer.detection.coco_metric import decode_mask

Example = tuple[Tensor, dict[str, Tensor]]
"""An image (3, H, W) in [0, 1] and its target, as torchvision's detectors take them."""


def build_target(
    annotations: Sequence[dict[str, Any]],
    height: int,
    width: int,
    category_ids: Sequence[int],
    *,
    masks: bool,
) -> dict[str, Tensor]:
    """Converts COCO annotations to torchvision's target; crowds are left out.

    Args:
        annotations: annotations as returned by `clean_annotations`.
        height: H.
        width: W.
        category_ids: ids of all categories of the data set, in order.
        masks: include masks.

    Returns:
        boxes float32 (D, 4) as x0, y0, x1, y1; labels int64 (D,), where i + 1 stands for
        `category_ids[i]` and 0 for the background; if `masks`, also masks uint8 (D, H, W).
    """
    objects = [item for item in annotations if not item["iscrowd"]]
    boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    label_of = {category_id: label for label, category_id in enumerate(category_ids, 1)}
    labels = torch.tensor([label_of[item["category_id"]] for item in objects], dtype=torch.int64)
    target = {"boxes": boxes, "labels": labels}
    if masks:
        decoded = np.zeros((len(objects), height, width), np.uint8)
        for mask, item in zip(decoded, objects, strict=True):
            mask[:] = decode_mask(item["segmentation"], height, width)
        target["masks"] = torch.from_numpy(decoded)
    return target


def scale(image: Tensor, target: dict[str, Tensor], *, shorter: int, longest: int) -> Example:
    """Scales an image and its target, as torchvision's detectors do in evaluation.

    Args:
        image: float32 (3, H, W).
        target: a target as returned by `build_target`.
        shorter: length of the shorter side after scaling, in pixels.
        longest: limit of the longer side, in pixels; if it is exceeded, the image becomes smaller.
    """
    height, width = image.shape[-2:]
    factor = min(shorter / min(height, width), longest / max(height, width))
    size = [max(1, int(height * factor)), max(1, int(width * factor))]
    scaled = functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    ratio_y, ratio_x = size[0] / height, size[1] / width
    ratios = torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y])
    target = target | {"boxes": target["boxes"] * ratios}
    if "masks" in target:
        masks = target["masks"][:, None]  # (D, 1, H, W)
        target["masks"] = functional.interpolate(masks, size, mode="nearest")[:, 0]
    return scaled, target


def flip_horizontally(image: Tensor, target: dict[str, Tensor]) -> Example:
    """Mirrors an image (3, H, W) and its target."""
    left, top, right, bottom = target["boxes"].unbind(dim=1)
    width = image.shape[-1]
    flipped = target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped
