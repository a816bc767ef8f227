"""An image's objects as the tensors that torchvision's detectors train on, scaled and mirrored with their image.

Shapes: H x W an image, D its objects.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hemoco.transfer.detection.coco_metric import decode_mask

Example = tuple[Tensor, dict[str, Tensor]]
"""An image (3, H, W) in [0, 1] and its target, as torchvision takes them."""


def build_target(
    annotations: Sequence[dict[str, Any]],
    height: int,
    width: int,
    category_ids: Sequence[int],
    *,
    masks: bool,
) -> dict[str, Tensor]:
    """What torchvision trains on; crowds are left out.

    Args:
        annotations: clean ones, see `clean_annotations`.
        height: H.
        width: W.
        category_ids: of all categories, with or without objects here.
        masks: whether masks are learnt, too.

    Returns:
        boxes float32 (D, 4) as x0, y0, x1, y1; labels int64 (D,), places in the category ids from 1 for 0 is the
        background; with masks also masks uint8 (D, H, W).
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
    """An image (3, H, W) and its target, scaled as torchvision's detectors scale an image they are given.

    Args:
        image: floats.
        target: of `build_target`.
        shorter: length that the shorter side gets, if the longer one then is within its limit.
        longest: that limit.
    """
    height, width = image.shape[-2:]
    factor = min(shorter / min(height, width), longest / max(height, width))
    size = [max(1, int(height * factor)), max(1, int(width * factor))]
    scaled = functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    ratio_y, ratio_x = size[0] / height, size[1] / width
    target = target | {
        "boxes": target["boxes"] * torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y])
    }
    if "masks" in target:
        target["masks"] = functional.interpolate(target["masks"][:, None], size, mode="nearest")[
            :, 0
        ]
    return scaled, target


def flip_horizontally(image: Tensor, target: dict[str, Tensor]) -> Example:
    """An image (3, H, W) and its target, mirrored."""
    left, top, right, bottom = target["boxes"].unbind(dim=1)
    width = image.shape[-1]
    flipped = target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped
