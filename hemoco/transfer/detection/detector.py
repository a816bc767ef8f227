"""torchvision's Faster R-CNN and Mask R-CNN on any ResNet, with a feature pyramid (FPN) or C4.

As in MoCo's protocol (He et al. 2020, section 4.2), no layer is frozen and batch normalisation is
trained, since the features of contrastive pretraining have other statistics than those of
supervised weights. The FPN layers have batch normalisation too. C4 has one more after layer4, like
`Res5ROIHeadsExtraNorm` in the official detection/train_net.py.

Departures from detectron2, which the papers used: FPN keeps 2000 proposals in training, not 1000;
the box loss of the region heads is smooth below 1/9; RoIAlign does not shift by half a pixel;
images are scaled without antialiasing.

Shapes: N images on this rank, R regions of all images, F channels of layer4, K classes including
the background.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from hemoco.config import DetectionConfig, MaskRcnnConfig
from hemoco.errors import ConfigError
from hemoco.models.batch_norm import BatchNorm
from hemoco.models.resnet import Backbone, feature_channels

NORMS = (BatchNorm, nn.GroupNorm, nn.LayerNorm)
"""Layers whose parameters have no weight decay."""
_MOMENTUM = 0.9
_WARMUP_START = 1e-3  # factor of the learning rate at step 0
_ASPECT_RATIOS = (0.5, 1.0, 2.0)
_POOLED_SIDE = 7  # side of the regions that FPN's box head takes
_C4_POOLED_SIDE = 14  # side of the regions that layer4 takes; its stride makes them 7 x 7
_C4_MASK_CHANNELS = 256
# RPN candidates before NMS per proposal after it: 6000 for 1000 in evaluation, 12000 for 2000 in
# training.
_C4_CANDIDATES = 6


def build_detector(
    backbone: Backbone, config: DetectionConfig, num_classes: int
) -> GeneralizedRCNN:
    """Builds a detector around the backbone's encoder; it has masks if the config is Mask R-CNN's.

    In training the images must have their final size; in evaluation the detector scales them.
    Strides follow from the shapes of the feature maps: with the small stem they are four times
    finer, so smaller anchors are needed.

    Args:
        backbone: its encoder becomes part of the detector and is trained; it is not copied.
        config: sizes of the parts.
        num_classes: K, the categories and the background.

    Raises:
        ConfigError: the encoder is not a ResNet.
    """
    if not all(hasattr(backbone.encoder, f"layer{stage}") for stage in (1, 2, 3, 4)):
        raise ConfigError(
            f"encoder.architecture is {backbone.config.architecture!r}, the backbone a "
            f"{type(backbone.encoder).__name__} without layer1 to layer4: detection needs one of "
            "timm's ResNets"
        )
    build = _build_c4 if config.architecture == "c4" else _build_fpn
    model = build(backbone, config, num_classes)
    model.requires_grad_(True)
    return model


def autocast(config: DetectionConfig, device: torch.device) -> torch.autocast:
    """The context in which a detector runs; the outputs of its heads are float32 in any case."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


class Schedule(NamedTuple):
    """A schedule for the global batch size of the config."""

    steps: int
    lr: float
    """Learning rate after the warm-up."""
    warmup_steps: int


def scaled_schedule(config: DetectionConfig) -> Schedule:
    """The config's schedule, adapted to the global batch size by the linear scaling rule.

    With r times the images per step, the learning rate is multiplied and the number of steps
    divided by r.
    """
    ratio = config.global_batch_size / config.reference_batch_size
    return Schedule(
        steps=max(1, round(config.steps / ratio)),
        lr=config.lr * ratio,
        warmup_steps=round(config.warmup_steps / ratio),
    )


def detection_lr(step: int, schedule: Schedule, milestones: tuple[float, ...]) -> float:
    """The learning rate of an optimiser step, as detectron2's WarmupMultiStepLR computes it.

    The warm-up is linear from a thousandth of the rate. At each milestone, a fraction of all steps
    (such as 60k and 80k of 90k), the rate drops to a tenth.
    """
    drops = sum(step >= round(milestone * schedule.steps) for milestone in milestones)
    warmth = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return schedule.lr * 0.1**drops * (_WARMUP_START * (1 - warmth) + warmth)


def detection_optimizer(model: nn.Module, config: DetectionConfig) -> torch.optim.SGD:
    """SGD over all parameters, without weight decay on normalisation layers."""
    norms: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, NORMS):
            norms += module.parameters()
    # by identity: `in` on a list of tensors compares their values
    norm_ids = {id(parameter) for parameter in norms}
    others = [parameter for parameter in model.parameters() if id(parameter) not in norm_ids]
    groups = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=scaled_schedule(config).lr, momentum=_MOMENTUM)


class C4Body(nn.Sequential):
    """A ResNet up to layer3, which is stage C4: images (N, 3, H, W) -> (N, F / 2, H / 16, W / 16).

    The feature map has the name "0", under which torchvision's RoI pooling looks for it.
    """

    def __init__(self, encoder: nn.Module) -> None:
        stages: list[tuple[str, nn.Module]] = []
        for name, child in encoder.named_children():
            stages.append((name, child))
            if name == "layer3":
                break
        super().__init__(OrderedDict(stages))
        self.out_channels = feature_channels(encoder)[2]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the feature map of layer3."""
        return {"0": super().forward(images)}  # type: ignore[no-untyped-call]


class Res5Heads(RoIHeads):  # type: ignore[misc]
    """Box and mask head that share layer4 and the norm after it (`Res5ROIHeads` of detectron2).

    In training the mask head takes the features of the proposals, which the box head has computed
    already; in evaluation it takes the features of the detected boxes.
    """

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Returns (detections of each image, {}) in evaluation and ([], losses) in training."""
        if targets is None:
            return self._detect(features, proposals, image_shapes), {}
        proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)  # (R, F / 2, 14, 14)
        regions = self.box_head(pooled)  # (R, F, 7, 7)
        logits, deltas = self.box_predictor(regions.mean((2, 3)))  # (R, K), (R, 4 K)
        class_loss, box_loss = fastrcnn_loss(logits, deltas, labels, regression)
        losses = {"loss_classifier": class_loss, "loss_box_reg": box_loss}
        if self.mask_predictor is not None:
            positive = [label > 0 for label in labels]  # per image: proposals that hit an object
            losses["loss_mask"] = maskrcnn_loss(
                self.mask_predictor(regions[torch.cat(positive)]),
                [boxes[chosen] for boxes, chosen in zip(proposals, positive, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [objects[chosen] for objects, chosen in zip(matched, positive, strict=True)],
            )
        return [], losses

    def _detect(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        pooled = self.box_roi_pool(features, proposals, image_shapes)  # (R, F / 2, 14, 14)
        regions = self.box_head(pooled)  # (R, F, 7, 7)
        logits, deltas = self.box_predictor(regions.mean((2, 3)))  # (R, K), (R, 4 K)
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        detections = [
            {"boxes": image_boxes, "scores": image_scores, "labels": image_labels}
            for image_boxes, image_scores, image_labels in zip(boxes, scores, labels, strict=True)
        ]
        if self.mask_predictor is not None:
            regions = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
            masks = maskrcnn_inference(self.mask_predictor(regions), labels)
            for detection, mask in zip(detections, masks, strict=True):
                detection["masks"] = mask
        return detections


# torchvision's heads with float32 outputs. Under autocast their layers compute in bfloat16, which
# is too coarse for boxes, scores and losses.


class _FloatRpnHead(RPNHead):  # type: ignore[misc]
    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(features)
        return [each.float() for each in logits], [each.float() for each in deltas]


class _FloatBoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(regions)
        return logits.float(), deltas.float()


class _FloatMaskPredictor(MaskRCNNPredictor):  # type: ignore[misc]
    def forward(self, regions: Tensor) -> Tensor:
        logits: Tensor = super().forward(regions)
        return logits.float()


def _build_fpn(backbone: Backbone, config: DetectionConfig, num_classes: int) -> GeneralizedRCNN:
    encoder, channels = backbone.encoder, config.fpn_channels
    levels = {f"layer{level}": str(level - 1) for level in (1, 2, 3, 4)}
    body = BackboneWithFPN(
        encoder, levels, feature_channels(encoder), channels, norm_layer=nn.BatchNorm2d
    )
    sizes_by_level = tuple((size,) for size in config.anchor_sizes)
    settings = _transform_settings(backbone, config) | {
        "rpn_anchor_generator": AnchorGenerator(sizes_by_level, (_ASPECT_RATIOS,) * 5),
        "rpn_head": _FloatRpnHead(channels, len(_ASPECT_RATIOS)),
        "rpn_pre_nms_top_n_train": 2 * config.proposals,
        "rpn_pre_nms_top_n_test": config.proposals,
        "rpn_post_nms_top_n_train": 2 * config.proposals,
        "rpn_post_nms_top_n_test": config.proposals,
        "box_batch_size_per_image": config.rois_per_image,
        "box_detections_per_img": config.max_detections,
        "box_head": TwoMLPHead(channels * _POOLED_SIDE**2, config.box_features),
        "box_predictor": _FloatBoxPredictor(config.box_features, num_classes),
    }
    if not isinstance(config, MaskRcnnConfig):
        return FasterRCNN(body, **settings)
    return MaskRCNN(
        body,
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=_FloatMaskPredictor(channels, channels, num_classes),
        **settings,
    )


def _build_c4(backbone: Backbone, config: DetectionConfig, num_classes: int) -> GeneralizedRCNN:
    encoder = backbone.encoder
    body = C4Body(encoder)
    anchors = AnchorGenerator((config.anchor_sizes,), (_ASPECT_RATIOS,))
    proposals = {"training": 2 * config.proposals, "testing": config.proposals}
    rpn = RegionProposalNetwork(
        anchors,
        _FloatRpnHead(body.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={mode: _C4_CANDIDATES * count for mode, count in proposals.items()},
        post_nms_top_n=proposals,
        nms_thresh=0.7,
    )
    features = feature_channels(encoder)[-1]  # F
    layers = OrderedDict(layer4=encoder.get_submodule("layer4"), norm=nn.BatchNorm2d(features))
    # The box predictor is made first: the order of construction is that of the random draws, so it
    # decides the initial weights that a seed gives (test_boxes_start_alike_with_and_without_masks).
    box_predictor = _FloatBoxPredictor(features, num_classes)
    mask_predictor = None
    if isinstance(config, MaskRcnnConfig):
        mask_predictor = _FloatMaskPredictor(features, _C4_MASK_CHANNELS, num_classes)
    heads = Res5Heads(
        # 0 adapts the number of samples to the size of the region, as in detectron2
        box_roi_pool=MultiScaleRoIAlign(["0"], _C4_POOLED_SIDE, sampling_ratio=0),
        box_head=nn.Sequential(layers),
        box_predictor=box_predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.rois_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=config.max_detections,
        mask_predictor=mask_predictor,
    )
    transform = GeneralizedRCNNTransform(**_transform_settings(backbone, config))
    return GeneralizedRCNN(body, rpn, heads, transform)


def _transform_settings(backbone: Backbone, config: DetectionConfig) -> dict[str, Any]:
    return {
        "min_size": config.test_size,
        "max_size": config.max_size,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        # Private; tests/unit/test_private_apis.py tests it. In training torchvision draws the size
        # of an image from a global generator. We draw it by seed and step, so that a resumed
        # training sees the same images. In evaluation torchvision scales in spite of this setting.
        "_skip_resize": True,
    }
