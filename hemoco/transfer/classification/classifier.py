"""Classifiers trained on augmented images: on a frozen backbone, or fine-tuned together with it.

The frozen form is the linear classification protocol of He et al. 2020, section 4.1, and of Chen,
Xie, He 2021, section 4. `linear_probe` is its fast substitute on cached features.

Shapes: N images, F features, C classes, S x S pixels.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from hemoco.config import (
    ClassifierConfig,
    FineTuneConfig,
    LinearClassifierConfig,
    ViewsConfig,
    flat_params,
)
from hemoco.data.stream.loader import CropPlan, StreamPosition
from hemoco.distributed import wrap_for_gradients
from hemoco.models.batch_norm import synchronise_batch_norms
from hemoco.models.resnet import Backbone
from hemoco.train.optim import cosine_lr, step_lr, warmup_factor
from hemoco.train.state import TrainingState

_MOMENTUM = 0.9
_INIT_STD = 0.01  # standard deviation of the classifier's initial weights, as in the official code
_STAGES = 5  # the stem and layer1 to layer4


class Classifier(nn.Module):
    """Backbone and linear classifier: normalised images (N, 3, S, S) -> float32 logits (N, C)."""

    def __init__(
        self, backbone: Backbone, classes: int, config: ClassifierConfig, seed: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.frozen = isinstance(config, LinearClassifierConfig)
        self.lower = config.precision == "bfloat16"
        self.head = nn.Linear(backbone.num_features, classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.head.weight, std=_INIT_STD, generator=generator)
        nn.init.zeros_(self.head.bias)
        backbone.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> "Classifier":
        """Sets the mode, but keeps a frozen backbone in evaluation mode.

        In training mode its BN statistics would change although no weight does (trap 28 of
        docs/traps.md; test_a_frozen_backbone_stays_bit_for_bit).
        """
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, S, S) -> logits (N, C)."""
        images = images.contiguous(memory_format=torch.channels_last)
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen),
            torch.autocast(images.device.type, torch.bfloat16, enabled=self.lower),
        ):
            features = self.backbone(images)  # (N, F)
        logits: Tensor = self.head(features.float())  # (N, C)
        return logits


@dataclasses.dataclass(kw_only=True)
class ClassifierState(TrainingState):
    """State of a classifier's training."""

    config: ClassifierConfig
    model: Classifier
    seed: int
    """Seed of the classifier's weights, the sample order and the crops."""
    position: StreamPosition | None = None
    """Position of the last batch consumed; None before the first."""

    @property
    def params(self) -> dict[str, str]:
        """Settings as flat dotted names, all below `transfer`, and the seed."""
        return flat_params({"transfer": self.config, "seed": self.seed})

    def state_dict(self) -> dict[str, Any]:
        """The state common to all trainings, and the position in the data."""
        return super().state_dict() | {"position": tuple(self.position) if self.position else None}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores the state that `state_dict` returned.

        Raises:
            CheckpointError: it was trained on other shards.
        """
        super().load_state_dict(saved)
        self.position = StreamPosition(*saved["position"]) if saved["position"] else None


def build_classifier_state(
    config: ClassifierConfig,
    backbone: Backbone,
    classes: int,
    *,
    seed: int,
    data_digest: str,
) -> ClassifierState:
    """Builds the state before the first step, on the backbone's device.

    Args:
        config: a `FineTuneConfig` also trains the backbone, with BN statistics over all ranks.
        backbone: becomes part of the model and is modified.
        classes: C.
        seed: seed of the training.
        data_digest: digest of the shard index.
    """
    device = backbone.pixel_mean.device
    model = Classifier(backbone, classes, config, seed)
    if not model.frozen:
        synchronise_batch_norms(model.backbone, device)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        parameter_groups(model, config),
        momentum=_MOMENTUM,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return ClassifierState(
        config=config,
        model=model,
        forward=wrap_for_gradients(model),
        optimizer=optimizer,
        seed=seed,
        data_digest=data_digest,
    )


def parameter_groups(model: Classifier, config: ClassifierConfig) -> list[dict[str, Any]]:
    """One parameter group for the classifier and, in fine-tuning, one for each backbone stage.

    `base_lr` is the rate that the schedule scales. Stage i, from 0 (stem) to 4 (layer4), has the
    rate backbone_lr * layer_decay^(4 - i) (after Clark et al. 2020, section 3.3).
    """
    groups: list[dict[str, Any]] = [
        {"params": list(model.head.parameters()), "base_lr": config.lr, "lr": config.lr}
    ]
    if not isinstance(config, FineTuneConfig):
        return groups
    stages: list[list[nn.Parameter]] = [[] for _ in range(_STAGES)]
    for name, parameter in model.backbone.encoder.named_parameters():
        module = name.partition(".")[0]  # conv1, bn1 or layer1 to layer4
        stage = int(module.removeprefix("layer")) if module.startswith("layer") else 0
        stages[stage].append(parameter)
    for stage, parameters in enumerate(stages):
        lr = config.backbone_lr * config.layer_decay ** (_STAGES - 1 - stage)
        groups.append({"params": parameters, "base_lr": lr, "lr": lr})
    return groups


def classifier_views(config: ClassifierConfig) -> ViewsConfig:
    """The augmentation of the training images: a random resized crop and a flip."""
    return ViewsConfig(
        size=config.size,
        crop_scale=config.crop_scale,
        jitter=0.0,
        grayscale=0.0,
        blur=(0.0, 0.0),
        flip=config.flip,
    )


def classifier_plan(config: ClassifierConfig, seed: int) -> CropPlan:
    """The stream's plan for the training: one crop of each image."""
    return CropPlan(
        seed=seed,
        epochs=config.epochs,
        global_batch_size=config.global_batch_size,
        views=classifier_views(config),
        crops=1,
        stream=config.stream,
    )


def classifier_lr_factor(config: ClassifierConfig, *, step: int, steps_per_epoch: int) -> float:
    """The factor of all base learning rates at an optimiser step, in [0, 1].

    The warm-up is linear per step; the schedule after it changes once per epoch.
    """
    epoch, warmup = step // steps_per_epoch, config.warmup_epochs
    if config.schedule == "step":
        scheduled = step_lr(epoch, config.epochs, 1.0)
    else:
        scheduled = cosine_lr(max(0, epoch - warmup), max(1, config.epochs - warmup), 1.0)
    return scheduled * warmup_factor(step, warmup * steps_per_epoch)
