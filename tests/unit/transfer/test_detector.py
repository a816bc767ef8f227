"""Detectors: their networks, their trained parameters, and the learning-rate schedule."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hemoco.config import DetectionConfig, EncoderConfig, FasterRcnnConfig, MaskRcnnConfig
from hemoco.distributed import rank
from hemoco.errors import ConfigError
from hemoco.models.batch_norm import AllReduceBatchNorm, synchronise_batch_norms
from hemoco.models.resnet import Backbone, build_encoder
from hemoco.transfer.detection.detector import (
    Schedule,
    build_detector,
    detection_lr,
    detection_optimizer,
    scaled_schedule,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.small_detector import SMALL

C4 = dataclasses.replace(SMALL, architecture="c4")
BOXES = FasterRcnnConfig(
    architecture="c4", test_size=64, max_size=64, rois_per_image=16, proposals=50
)
BOTH = pytest.mark.parametrize("config", [SMALL, C4], ids=["fpn", "c4"])


def backbone(architecture: str = "resnet10t", stem: str = "imagenet") -> Backbone:
    config = EncoderConfig(architecture=architecture, stem=stem)  # type: ignore[arg-type]
    return Backbone(build_encoder(config, 0), config, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 10:40, 20:50] = 1
    target = {
        "boxes": torch.tensor([[20.0, 10, 50, 40]]),
        "labels": torch.tensor([1]),
        "masks": masks,
    }
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return list(images), [target, target]


@BOTH
def test_everything_is_trained_and_only_norms_do_not_decay(config: MaskRcnnConfig) -> None:
    whole = backbone()
    whole.requires_grad_(False)  # as a linear probe may have left it
    model = build_detector(whole, config, 3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    decay = {}
    for group in detection_optimizer(model, config).param_groups:
        for parameter in group["params"]:
            decay[id(parameter)] = group["weight_decay"]
    assert len(decay) == len(list(model.parameters()))
    for module in model.modules():
        norm = isinstance(module, nn.BatchNorm2d)
        assert {decay[id(p)] for p in module.parameters(recurse=False)} <= {0.0 if norm else 1e-4}


def test_a_network_with_group_norm_has_no_decay_on_it() -> None:
    model = build_detector(backbone("resnet50_gn"), SMALL, 3)
    without = detection_optimizer(model, SMALL).param_groups[1]["params"]
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm | nn.BatchNorm2d)]
    assert len(without) == 2 * len(norms) and any(isinstance(norm, nn.GroupNorm) for norm in norms)


@pytest.mark.parametrize("images", [1, 2, 8, 16, 64])
def test_lr_is_two_hundredths_for_16_images_and_steps_are_its_inverse(images: int) -> None:
    schedule = scaled_schedule(FasterRcnnConfig(global_batch_size=images))
    assert schedule.lr == pytest.approx(0.02 * images / 16)
    assert schedule.steps * images == 90_000 * 16
    assert schedule.warmup_steps == round(1000 * 16 / images)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 2e-5),
        (500, 0.5005 * 0.02),
        (1000, 0.02),
        (59_999, 0.02),
        (60_000, 0.002),
        (79_999, 0.002),
        (80_000, 2e-4),
    ],
)
def test_lr_follows_detectron2s_1x_schedule(step: int, expected: float) -> None:
    config = MaskRcnnConfig()
    assert detection_lr(step, scaled_schedule(config), config.milestones) == pytest.approx(expected)


def test_lr_follows_the_voc_schedule() -> None:
    schedule, milestones = Schedule(24_000, 0.02, 100), (18 / 24, 22 / 24)
    lrs = [
        detection_lr(step, schedule, milestones) for step in (100, 17_999, 18_000, 21_999, 22_000)
    ]
    assert lrs == pytest.approx([0.02, 0.02, 0.002, 0.002, 2e-4])


def test_without_warm_up_the_first_step_has_the_whole_lr() -> None:
    assert detection_lr(0, Schedule(10, 0.1, 0), (0.5,)) == pytest.approx(0.1)


def test_the_pyramid_computes_what_the_encoder_computes_and_has_batch_norm() -> None:
    whole = backbone().eval()
    images = torch.randn(2, 3, 64, 64)
    expected = whole.encoder.forward_features(images)  # type: ignore[operator]
    body = build_detector(whole, SMALL, 3).eval().backbone
    torch.testing.assert_close(body.body(images)["3"], expected)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in body.fpn.modules()) == 8


def test_c4_computes_layer4_on_regions_of_layer3_then_an_extra_norm() -> None:
    whole = backbone().eval()
    images = torch.randn(2, 3, 64, 64)
    expected = whole.encoder.forward_features(images)  # type: ignore[operator]
    model = build_detector(whole, C4, 3).eval()
    head = model.roi_heads.box_head
    torch.testing.assert_close(head.layer4(model.backbone(images)["0"]), expected)
    assert isinstance(head.norm, nn.BatchNorm2d) and head.norm.num_features == 512
    names = [name for name, _ in model.named_parameters()]
    of_head = [name for name in names if "layer4" in name or "box_head.norm" in name]
    prefixes = ("roi_heads.box_head.layer4.", "roi_heads.box_head.norm.")
    assert of_head and all(name.startswith(prefixes) for name in of_head)


@pytest.mark.parametrize(
    ("architecture", "stem", "stride", "layer3", "layer4"),
    [
        ("resnet10t", "imagenet", 16, 256, 512),
        ("resnet18", "small", 4, 256, 512),
        ("resnet50", "imagenet", 16, 1024, 2048),
    ],
)
def test_c4_has_the_strides_and_widths_of_its_network(
    architecture: str, stem: str, stride: int, layer3: int, layer4: int
) -> None:
    model = build_detector(backbone(architecture, stem), C4, 5).eval()
    features = model.backbone(torch.zeros(1, 3, 64, 96))["0"]
    assert features.shape == (1, layer3, 64 // stride, 96 // stride)
    assert model.rpn.head.cls_logits.out_channels == 15  # five sizes, three shapes
    regions = model.roi_heads.box_head(torch.zeros(2, layer3, 14, 14))
    assert regions.shape == (2, layer4, 7, 7)
    scores, boxes = model.roi_heads.box_predictor(regions.mean((2, 3)))
    assert (scores.shape, boxes.shape) == ((2, 5), (2, 20))
    assert model.roi_heads.mask_predictor(regions).shape == (2, 5, 14, 14)
    assert model.roi_heads.mask_predictor.conv5_mask.out_channels == 256


def test_rpn_of_c4_looks_at_6000_boxes_and_keeps_1000() -> None:
    rpn = build_detector(backbone(), dataclasses.replace(C4, proposals=1000), 3).rpn
    assert rpn._pre_nms_top_n == {"training": 12_000, "testing": 6000}
    assert rpn._post_nms_top_n == {"training": 2000, "testing": 1000}


def test_boxes_start_alike_with_and_without_masks() -> None:
    without_masks = dataclasses.replace(BOXES, anchor_sizes=C4.anchor_sizes)
    weights = []
    for config in (C4, without_masks):
        torch.manual_seed(0)
        model = build_detector(backbone(), config, 3)
        weights.append(model.roi_heads.box_predictor.cls_score.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("architecture", ["fpn", "c4"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_boxes_alone_and_boxes_with_masks_are_learnt_with_either_stem(
    architecture: str, stem: str
) -> None:
    for kind, losses in ((BOXES, 4), (C4, 5)):
        config: DetectionConfig = dataclasses.replace(
            kind, architecture=architecture, anchor_sizes=(8, 16, 24, 32, 64)
        )
        model = build_detector(backbone(stem=stem), config, 3).train()
        parts = model(*batch())
        assert len(parts) == losses and all(loss.isfinite() for loss in parts.values())
        sum(parts.values()).backward()
        unused = [name for name, p in model.named_parameters() if p.grad is None]
        assert not unused, unused


def test_masks_of_c4_are_learnt_from_the_features_that_boxes_are_found_with() -> None:
    model = build_detector(backbone(), C4, 3).train()
    model(*batch())
    assert model.roi_heads.box_head.norm.num_batches_tracked == 1


@BOTH
def test_losses_are_float32_in_bfloat16(config: MaskRcnnConfig) -> None:
    model = build_detector(backbone(), config, 3).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch())
        deltas = model.rpn.head([torch.zeros(1, model.backbone.out_channels, 4, 4)])[1][0]
    assert {loss.dtype for loss in [*losses.values(), deltas]} == {torch.float32}


def test_images_are_normalised_as_the_backbones_were() -> None:
    for config in (SMALL, C4):
        transform = build_detector(backbone(), config, 3).transform
        assert (transform.image_mean, transform.image_std) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2])


def test_a_network_that_is_no_resnet_is_refused() -> None:
    config = EncoderConfig(architecture="resnet18")
    other = Backbone(nn.Sequential(nn.Conv2d(3, 8, 3)), config, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    with pytest.raises(
        ConfigError,
        match="Sequential without layer1 to layer4: detection needs one of timm's ResNets",
    ):
        build_detector(other, SMALL, 3)


class OnRank(NamedTuple):
    """Results of one of two ranks."""

    output: Tensor
    statistics: tuple[Tensor, Tensor]
    gradient: Tensor
    kinds: list[str]


def uneven_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, 4, 6, generator=generator) * 3 + 1,
        torch.randn(1, 3, 2, 2, generator=generator),
    ]


def as_pixels(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (pixels, C)."""
    return images.transpose(0, 1).flatten(1).T


def on_rank() -> OnRank:
    """Runs a synchronised BN whose ranks have different image sizes, and converts a detector."""
    norm = AllReduceBatchNorm(3)
    images = uneven_images()[rank()].requires_grad_()
    output = norm(images)
    as_pixels(output).pow(3).sum().backward()
    assert images.grad is not None
    return OnRank(
        output.detach(), (norm.running_mean, norm.running_var), images.grad, synchronised()
    )


def synchronised() -> list[str]:
    """Class names of a detector's BN layers after `synchronise_batch_norms`.

    Checks that tensor names and values stay the same.
    """
    model = build_detector(backbone(), C4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    synchronise_batch_norms(model, torch.device("cpu"))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    kinds = (nn.BatchNorm2d, AllReduceBatchNorm)
    return [type(module).__name__ for module in model.modules() if isinstance(module, kinds)]


@pytest.fixture(scope="module")
def ranks() -> list[OnRank]:
    by_rank: list[OnRank] = run_ranks(on_rank, 2)
    return by_rank


def test_ranks_with_images_of_other_sizes_share_the_statistics_of_all_pixels(
    ranks: list[OnRank],
) -> None:
    pixels = torch.cat([as_pixels(each) for each in uneven_images()]).requires_grad_()  # (52, 3)
    norm = nn.BatchNorm1d(3)
    expected = norm(pixels)
    expected.pow(3).sum().backward()
    assert pixels.grad is not None
    outputs = expected.detach().split([48, 4])
    gradients = pixels.grad.split([48, 4])
    for actual, output, gradient in zip(ranks, outputs, gradients, strict=True):
        torch.testing.assert_close(as_pixels(actual.output), output)
        torch.testing.assert_close(actual.statistics, (norm.running_mean, norm.running_var))
        torch.testing.assert_close(as_pixels(actual.gradient), gradient, atol=1e-4, rtol=1e-4)


def test_every_batch_norm_is_over_all_ranks(ranks: list[OnRank]) -> None:
    modules = build_detector(backbone(), C4, 3).modules()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in modules)
    assert ranks[0].kinds == ranks[1].kinds == ["AllReduceBatchNorm"] * norms
