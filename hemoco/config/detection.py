"""Config classes of the detection transfers; `hemoco.config` re-exports them."""

import dataclasses
from typing import Literal

from hemoco.config.checks import require, require_not_negative, require_positive
from hemoco.config.transfer import TrainedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionConfig(TrainedConfig):
    """A ResNet detector of torchvision, fine-tuned as a whole, with synchronised BN.

    Nothing is frozen. The defaults are the 1x schedule of COCO with a feature pyramid. `steps`,
    `lr` and `warmup_steps` are meant for `reference_batch_size` images; another
    `global_batch_size` scales them by the linear rule (Goyal et al. 2017, arXiv:1706.02677). Each
    rank samples anchors and proposals by itself, so results with different numbers of `workers`
    differ as those of different seeds do.
    """

    architecture: Literal["fpn", "c4"] = "fpn"
    """`fpn`: feature pyramid. `c4`: the network's last stage is the head of the regions.
    With `c4` an extra BN follows that stage (He et al. 2020, arXiv:1911.05722, appendix)."""
    global_batch_size: int = 16
    """Images in an optimiser step, over all workers."""
    reference_batch_size: int = 16
    """Images in an optimiser step that `steps`, `lr` and `warmup_steps` are meant for."""
    steps: int = 90_000
    """Optimiser steps at the reference batch size."""
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    """Shares of the steps after which the learning rate falls to a tenth, in (0, 1)."""
    lr: float = 0.02
    """Learning rate at the reference batch size."""
    warmup_steps: int = 1000
    """Optimiser steps of linear warm-up at the reference batch size."""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters but those of normalisation layers."""
    flip: float = 0.5
    """Probability of a horizontal flip in training.
    Set 0 if a mirrored object is of another class, as with digits."""
    train_sizes: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Shorter sides, in pixels; each training image is scaled to one of them, drawn at random."""
    test_size: int = 800
    """Shorter side of test images, pixels."""
    max_size: int = 1333
    """Longest side of any image, pixels; a longer one is scaled down further."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Sides of the five anchors, pixels; with `fpn` one for each level of the pyramid."""
    fpn_channels: int = 256
    """Channels of the pyramid; not used with `c4`."""
    box_features: int = 1024
    """Hidden size of the box head; not used with `c4`."""
    rois_per_image: int = 512
    """Proposals sampled from each training image for the loss of the heads."""
    proposals: int = 1000
    """Proposals of an image kept after the non-maximum suppression of the region proposal network.
    In training twice as many are kept."""
    max_detections: int = 100
    """Detections kept for an image; the metric of VOC counts all of them."""
    precise_bn_steps: int = 200
    """Training batches over which BN statistics are averaged before the evaluation.
    0 evaluates with the running statistics."""
    metric: Literal["coco", "voc", "voc07"] = "coco"
    """`coco`: average precision of COCO; the headline value is over IoU 0.50 to 0.95.
    `voc`: that of VOC at IoU 0.50, by area (2010 and later); `voc07`: by eleven points (2007)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.anchor_sizes) == 5,  # the pyramid has five levels
            f"detection.anchor_sizes is {self.anchor_sizes}: five sizes are needed",
        )
        require(
            bool(self.train_sizes) and min(self.train_sizes) > 0,
            f"detection.train_sizes is {self.train_sizes}: name at least one, all positive",
        )
        require_positive(
            self,
            "detection",
            "reference_batch_size",
            "steps",
            "lr",
            "test_size",
            "max_size",
            "fpn_channels",
            "box_features",
            "rois_per_image",
            "proposals",
            "max_detections",
        )
        require_not_negative(self, "detection", "warmup_steps", "weight_decay", "precise_bn_steps")
        require(0 <= self.flip <= 1, f"detection.flip is {self.flip}: it must be in [0, 1]")
        require(
            all(0 < share < 1 for share in self.milestones),
            f"detection.milestones is {self.milestones}: shares of the steps, between 0 and 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FasterRcnnConfig(DetectionConfig):
    """Faster R-CNN (Ren et al. 2015, arXiv:1506.01497): boxes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRcnnConfig(DetectionConfig):
    """Mask R-CNN (He et al. 2017, arXiv:1703.06870): boxes and masks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.metric == "coco",
            f"mask_rcnn.metric is {self.metric!r}: VOC has no masks; use Faster R-CNN for it",
        )
