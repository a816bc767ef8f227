"""What a detection transfer is: its config classes, re-exported by `hemoco.config`."""

import dataclasses
from typing import Literal

from hemoco.config.checks import require, require_not_negative, require_positive
from hemoco.config.transfer import TrainedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionConfig(TrainedConfig):
    """A ResNet detector of torchvision, fine-tuned whole; BN is trained and synchronised, nothing is frozen.

    The defaults are the 1x schedule of COCO with a feature pyramid. `steps`, `lr` and `warmup_steps` are meant for
    `reference_batch_size` images; another `global_batch_size` scales them by the linear rule (Goyal et al. 2017).
    Anchors and proposals are drawn on each rank, so another number of `workers` gives another result within the noise.
    """

    architecture: Literal["fpn", "c4"] = "fpn"
    """Feature pyramid, or the last stage as the head of the regions, with the extra BN after it that MoCo's protocol
    has (He et al. 2020, appendix)."""
    global_batch_size: int = 16
    reference_batch_size: int = 16
    """Images per step that `steps`, `lr` and `warmup_steps` are meant for."""
    steps: int = 90_000
    """Optimiser steps."""
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    """Shares of the steps after which the learning rate falls to a tenth."""
    lr: float = 0.02
    """Learning rate."""
    warmup_steps: int = 1000
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    """Not on normalisation layers."""
    flip: float = 0.5
    """Probability of a horizontal flip in training; 0 where mirrored objects are others, as digits."""
    train_sizes: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Shorter sides, in pixels, one of which each training image is scaled to."""
    test_size: int = 800
    """Shorter side of test images, pixels."""
    max_size: int = 1333
    """Longer side at most, pixels."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Anchor sides, pixels; of the pyramid one per level, the last the pooled one."""
    fpn_channels: int = 256
    """Channels of the pyramid; C4 has none."""
    box_features: int = 1024
    """Hidden size of the pyramid's box head; that of C4 is the network's last stage."""
    rois_per_image: int = 512
    """Proposals sampled per training image."""
    proposals: int = 1000
    """Proposals kept per image after RPN's NMS, in training twice as many."""
    max_detections: int = 100
    """Detections kept per image; VOC's metric counts all that are kept."""
    precise_bn_steps: int = 200
    """Training batches over which BN statistics are averaged before the evaluation; 0: running averages."""
    metric: Literal["coco", "voc", "voc07"] = "coco"
    """COCO's average precision (headline: over IoU 0.50 to 0.95), or VOC's at IoU 0.50: area (2010 and later) or eleven
    points (2007)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.anchor_sizes) == 5,
            f"detection.anchor_sizes is {self.anchor_sizes}: five sizes are needed",
        )
        require(
            bool(self.train_sizes) and min(self.train_sizes) > 0,
            f"detection.train_sizes is {self.train_sizes}: name at least one, all positive",
        )
        sizes = (
            "test_size",
            "max_size",
            "fpn_channels",
            "box_features",
            "rois_per_image",
            "proposals",
            "max_detections",
        )
        require_positive(self, "detection", "reference_batch_size", "steps", "lr", *sizes)
        require_not_negative(self, "detection", "warmup_steps", "weight_decay", "precise_bn_steps")
        require(0 <= self.flip <= 1, f"detection.flip is {self.flip}: it must be in [0, 1]")
        require(
            all(0 < share < 1 for share in self.milestones),
            f"detection.milestones is {self.milestones}: shares of the steps, between 0 and 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FasterRcnnConfig(DetectionConfig):
    """Faster R-CNN (Ren et al. 2015): boxes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRcnnConfig(DetectionConfig):
    """Mask R-CNN (He et al. 2017): boxes and masks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.metric == "coco",
            f"mask_rcnn.metric is {self.metric!r}: VOC has no masks; use Faster R-CNN for it",
        )
