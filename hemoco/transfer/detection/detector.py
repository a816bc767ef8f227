"""Faster R-CNN and Mask R-CNN of torchvision on any ResNet, with a feature pyramid or on its fourth stage (C4).

Nothing is frozen and batch normalisation is trained, as in MoCo's protocol (He et al. 2020, section 4.2): statistics of
contrastive pretraining are far from those of supervised weights. The pyramid has batch normalisation, too; C4 has one
more after the last stage (`Res5ROIHeadsExtraNorm` of the official detection/train_net.py).

Where torchvision is not detectron2, which the papers used: the pyramid keeps 2000 proposals in training, not 1000; the
box loss of the region heads is smooth below 1/9; RoIAlign does not shift by half a pixel; images are scaled without
antialiasing.

Shapes: N images on this rank, R regions of all of them, F channels of layer4, K classes with the background.
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
"""Layers whose parameters do not decay."""
_MOMENTUM = 0.9
_WARMUP_START = 1e-3  # share of the learning rate
_ASPECT_RATIOS = (0.5, 1.0, 2.0)
_POOLED_SIDE = 7  # of the pyramid's box head's input
_C4_POOLED_SIDE = 14  # of layer4's input; it halves that
_C4_MASK_CHANNELS = 256
_C4_CANDIDATES = (
    6  # of RPN before its NMS for each kept after it: 6000 for 1000, in training 12000 for 2000
)


def build_detector(
    backbone: Backbone, config: DetectionConfig, num_classes: int
) -> GeneralizedRCNN:
    """A detector around the backbone's own encoder, which it changes; masks where the config is Mask R-CNN's.

    In training it takes images that have their final size, in evaluation it scales them. Strides follow from the
    shapes, so a backbone with the small stem has them four times finer and needs smaller anchors.

    Args:
        backbone: not copied.
        config: sizes of the parts.
        num_classes: K, categories and the background.

    Raises:
        ConfigError: the encoder is no ResNet.
    """
    if not all(hasattr(backbone.encoder, f"layer{stage}") for stage in (1, 2, 3, 4)):
        raise ConfigError(
            f"encoder.architecture is {backbone.config.architecture!r}, the backbone a "
            f"{type(backbone.encoder).__name__} without layer1 to layer4: detection needs one of timm's ResNets"
        )
    build = _build_c4 if config.architecture == "c4" else _build_fpn
    model = build(backbone, config, num_classes)
    model.requires_grad_(True)
    return model


def autocast(config: DetectionConfig, device: torch.device) -> torch.autocast:
    """In which a detector runs; what its heads give is float32 all the same."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


class Schedule(NamedTuple):
    """Of a training at its global batch size."""

    steps: int
    lr: float
    warmup_steps: int


def scaled_schedule(config: DetectionConfig) -> Schedule:
    """The config's schedule by the linear rule: r times the images per step, r times the rate, 1 / r of the steps."""
    ratio = config.global_batch_size / config.reference_batch_size
    return Schedule(
        max(1, round(config.steps / ratio)), config.lr * ratio, round(config.warmup_steps / ratio)
    )


def detection_lr(step: int, schedule: Schedule, milestones: tuple[float, ...]) -> float:
    """The learning rate of an optimiser step, as detectron2's WarmupMultiStepLR has it.

    Linear warm-up from a thousandth; a tenth from each milestone on (shares of the steps: 60k and 80k of 90k).
    """
    decayed = schedule.lr * 0.1 ** sum(
        step >= round(share * schedule.steps) for share in milestones
    )
    passed = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return decayed * (_WARMUP_START * (1 - passed) + passed)


def detection_optimizer(model: nn.Module, config: DetectionConfig) -> torch.optim.SGD:
    """SGD over all parameters; those of normalisation layers do not decay."""
    norms = [
        parameter
        for module in model.modules()
        if isinstance(module, NORMS)
        for parameter in module.parameters()
    ]
    of_norms = {id(parameter) for parameter in norms}
    others = [parameter for parameter in model.parameters() if id(parameter) not in of_norms]
    groups = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=scaled_schedule(config).lr, momentum=_MOMENTUM)


class C4Body(nn.Sequential):
    """A ResNet up to layer3: images (N, 3, H, W) -> its map (N, F / 2, H / 16, W / 16) under the name "0"."""

    def __init__(self, encoder: nn.Module) -> None:
        stages: list[tuple[str, nn.Module]] = []
        for name, child in encoder.named_children():
            stages.append((name, child))
            if name == "layer3":
                break
        super().__init__(OrderedDict(stages))
        self.out_channels = feature_channels(encoder)[2]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The map of layer3."""
        return {"0": super().forward(images)}  # type: ignore[no-untyped-call]


class Res5Heads(RoIHeads):  # type: ignore[misc]
    """Box and mask head that share layer4 and the normalisation after it (`Res5ROIHeads` of detectron2).

    In training the masks use the regions' features that the boxes were found with; in evaluation the features of the
    boxes that were found.
    """

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image in evaluation, losses in training; the other is empty."""
        if targets is None:
            return self._detect(features, proposals, image_shapes), {}
        proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        regions = self.box_head(
            self.box_roi_pool(features, proposals, image_shapes)
        )  # (R, F, 7, 7)
        class_loss, box_loss = fastrcnn_loss(
            *self.box_predictor(regions.mean((2, 3))), labels, regression
        )
        losses = {"loss_classifier": class_loss, "loss_box_reg": box_loss}
        if self.mask_predictor is not None:
            of_objects = [label > 0 for label in labels]
            losses["loss_mask"] = maskrcnn_loss(
                self.mask_predictor(regions[torch.cat(of_objects)]),
                [boxes[chosen] for boxes, chosen in zip(proposals, of_objects, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [places[chosen] for places, chosen in zip(matched, of_objects, strict=True)],
            )
        return [], losses

    def _detect(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        regions = self.box_head(
            self.box_roi_pool(features, proposals, image_shapes)
        )  # (R, F, 7, 7)
        predicted = self.box_predictor(regions.mean((2, 3)))
        found = zip(*self.postprocess_detections(*predicted, proposals, image_shapes), strict=True)
        detections = [
            {"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in found
        ]
        if self.mask_predictor is not None:
            boxes = [each["boxes"] for each in detections]
            regions = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
            masks = maskrcnn_inference(
                self.mask_predictor(regions), [each["labels"] for each in detections]
            )
            for each, mask in zip(detections, masks, strict=True):
                each["masks"] = mask
        return detections


# torchvision's, with outputs in float32 where autocast runs the layers in bfloat16: boxes, scores and losses need it


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
    settings = _transform_settings(backbone, config) | {
        "rpn_anchor_generator": AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes), (_ASPECT_RATIOS,) * 5
        ),
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
    kept = {"training": 2 * config.proposals, "testing": config.proposals}
    rpn = RegionProposalNetwork(
        anchors,
        _FloatRpnHead(body.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={mode: _C4_CANDIDATES * count for mode, count in kept.items()},
        post_nms_top_n=kept,
        nms_thresh=0.7,
    )
    features = feature_channels(encoder)[-1]  # F
    layers = OrderedDict(layer4=encoder.get_submodule("layer4"), norm=nn.BatchNorm2d(features))
    masks = isinstance(config, MaskRcnnConfig)
    heads = Res5Heads(
        # sampled as finely as a region needs, as in detectron2
        box_roi_pool=MultiScaleRoIAlign(["0"], _C4_POOLED_SIDE, sampling_ratio=0),
        box_head=nn.Sequential(layers),
        box_predictor=_FloatBoxPredictor(features, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.rois_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=config.max_detections,
        mask_predictor=_FloatMaskPredictor(features, _C4_MASK_CHANNELS, num_classes)
        if masks
        else None,
    )
    return GeneralizedRCNN(
        body, rpn, heads, GeneralizedRCNNTransform(**_transform_settings(backbone, config))
    )


def _transform_settings(backbone: Backbone, config: DetectionConfig) -> dict[str, Any]:
    return {
        "min_size": config.test_size,
        "max_size": config.max_size,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "_skip_resize": True,  # in training: sizes are drawn by step, so that a resumed training draws them again
    }
