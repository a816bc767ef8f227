"""Encoders against torchvision's, and initial weights against the formulas of the papers."""

import itertools
import statistics
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

from hemoco.config import EncoderConfig
from hemoco.errors import ConfigError
from hemoco.models.resnet import Backbone, build_encoder, feature_channels, init_convolution, seeded

TINY = EncoderConfig(architecture="resnet10t", stem="small")
PLAIN = EncoderConfig(architecture="resnet18", stem="small", shortcuts=False)
RESIDUAL = EncoderConfig(architecture="resnet18", stem="small")


@pytest.mark.parametrize("name", ["resnet50", "wide_resnet50_2", "resnet101", "resnet152"])
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    encoder = build_encoder(EncoderConfig(architecture=name), seed=0).eval()
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name).state_dict()
    shapes = {name: tensor.shape for name, tensor in theirs.items() if not name.startswith("fc.")}
    assert {name: tensor.shape for name, tensor in encoder.state_dict().items()} == shapes
    with torch.inference_mode():
        assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, encoder.num_features)


def test_output_equals_torchvisions_for_the_same_weights() -> None:
    ours = build_encoder(EncoderConfig(architecture="resnet18"), seed=0).eval()
    theirs = torchvision.models.resnet18().eval()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (build_encoder(TINY, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


FORMULAS = [
    ({}, 2 / (128 * 9)),
    ({"nonlinearity": "linear"}, 1 / (128 * 9)),
    ({"fan_mode": "fan_in"}, 2 / (64 * 9)),
    ({"fan_mode": "fan_in", "nonlinearity": "linear"}, 1 / (64 * 9)),
    ({"init": "xavier"}, 2 / ((64 + 128) * 9)),
]
"""Settings, and the variance that they give the weights of a 3x3 convolution of 64 to 128 channels.

He et al. 2015, equations 10 and 14; Glorot and Bengio 2010, equation 12.
"""


@pytest.mark.parametrize(("settings", "variance"), FORMULAS)
def test_weights_have_the_variance_of_the_formula(
    settings: dict[str, str], variance: float
) -> None:
    encoder = build_encoder(EncoderConfig(architecture="resnet18", **settings), seed=0)
    weight = encoder.layer2[0].conv1.weight
    assert weight.shape == (128, 64, 3, 3)
    # 1% is 4 standard errors of 73,728 draws
    assert weight.std().item() == pytest.approx(variance**0.5, rel=0.01)
    assert abs(weight.mean().item()) < 4 * (variance / weight.numel()) ** 0.5


class VarianceRatio(NamedTuple):
    """Change of variance over all layers in the direction of computation."""

    activations: float
    """Variance after the last layer / after the first."""
    gradients: float
    """Variance after the first layer / after the last."""


def variance_ratio(config: EncoderConfig, widths: list[int], seed: int) -> VarianceRatio:
    """Change of variance through 1x1 convolutions of these widths with ReLUs, without BN."""
    with seeded(seed):
        hidden = torch.randn(4, widths[0], 4, 4)
        outputs = []
        for inputs, channels in itertools.pairwise(widths):
            convolution = nn.Conv2d(inputs, channels, 1, bias=False)
            init_convolution(convolution, config)
            output = convolution(hidden)
            output.retain_grad()
            outputs.append(output)
            hidden = output.relu()
        output.backward(torch.randn_like(output))
    first, last = outputs[0], outputs[-1]
    return VarianceRatio(
        activations=(last.var() / first.var()).item(),
        gradients=(first.grad.var() / last.grad.var()).item(),
    )


@pytest.mark.parametrize(
    ("settings", "layer_gain"),
    [({"fan_mode": "fan_in"}, 1), ({"fan_mode": "fan_out"}, 1), ({"init": "xavier"}, 1 / 2)],
)
def test_kaiming_keeps_the_variance_through_30_plain_layers_and_xavier_halves_it_in_each(
    settings: dict[str, str], layer_gain: float
) -> None:
    runs = [variance_ratio(EncoderConfig(**settings), [512] * 31, seed) for seed in range(8)]
    activations = statistics.mean(run.activations for run in runs)
    gradients = statistics.mean(run.gradients for run in runs)
    # at width 512 the logarithm of one run has a deviation of sqrt(29 * 5 / 512) = 0.53; the mean
    # of 8 runs has one of about 20%
    expected = layer_gain**29
    assert 0.5 < activations / expected < 2
    assert 0.5 < gradients / expected < 2


def test_fan_in_and_fan_out_differ_by_the_widths_of_the_two_ends() -> None:
    widths = [32] * 16 + [128] * 15  # one layer has fan_out = 4 fan_in; the draws are the same
    by_in = variance_ratio(EncoderConfig(fan_mode="fan_in"), widths, seed=0)
    by_out = variance_ratio(EncoderConfig(fan_mode="fan_out"), widths, seed=0)
    assert by_in.activations == pytest.approx(4 * by_out.activations, rel=1e-3)
    assert by_in.gradients == pytest.approx(4 * by_out.gradients, rel=1e-3)


class BlockStd(NamedTuple):
    """Standard deviations at a block's output."""

    output: float
    gradient: float


def block_stds(config: EncoderConfig) -> list[BlockStd]:
    """Standard deviations at all blocks of an encoder in training mode, on noise images."""
    encoder = build_encoder(config, seed=0)
    outputs = []
    for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        for block in layer:
            block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    features = encoder(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    stem, *gradients = torch.autograd.grad(
        features.square().sum(), [encoder.conv1.weight, *outputs]
    )
    assert features.isfinite().all() and stem.isfinite().all() and stem.any()
    return [
        BlockStd(out.std().item(), grad.std().item())
        for out, grad in zip(outputs, gradients, strict=True)
    ]


def test_resnet101_bounds_activations_and_gradients_and_its_plain_counterpart_does_not() -> None:
    residual = block_stds(EncoderConfig(architecture="resnet101"))
    plain = block_stds(EncoderConfig(architecture="resnet101", shortcuts=False))
    # each of the 23 blocks of layer3 adds a branch of variance 1, of which ReLU keeps a part
    assert all(0.5 < block.output < 23**0.5 for block in residual)
    assert residual[0].gradient / residual[-1].gradient < 1e3
    # BN and ReLU without shortcuts: gradients grow by sqrt(pi / (pi - 1)) = 1.21 in each layer
    # (Yang et al. 2019, arXiv:1902.08129)
    assert plain[0].gradient / plain[-1].gradient > 1e6


@torch.no_grad()
def with_dead_last_bn(config: EncoderConfig) -> tuple[Tensor, Tensor]:
    """Input and output of a block whose last BN returns 0."""
    block = build_encoder(config, seed=0).layer2[1]
    block.bn2.weight.zero_()
    block_input = torch.randn(2, 128, 8, 8, generator=torch.Generator().manual_seed(0))
    return block_input, block(block_input.clone())


def test_a_residual_block_passes_its_input_on_and_a_plain_one_does_not() -> None:
    block_input, output = with_dead_last_bn(RESIDUAL)
    assert torch.equal(output, block_input.relu())
    assert not with_dead_last_bn(PLAIN)[1].any()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_plain_network_is_the_residual_one_of_the_same_seed_without_projections(name: str) -> None:
    plain = build_encoder(EncoderConfig(architecture=name, shortcuts=False), seed=0).state_dict()
    residual = build_encoder(EncoderConfig(architecture=name), seed=0).state_dict()
    assert list(plain) == [key for key in residual if ".downsample." not in key]
    assert len(plain) < len(residual)
    assert all(torch.equal(tensor, residual[key]) for key, tensor in plain.items())


@pytest.mark.parametrize("zero", [False, True])
def test_zero_init_last_zeroes_the_last_bn_of_each_block(zero: bool) -> None:
    encoder = build_encoder(EncoderConfig(architecture="resnet18", zero_init_last=zero), seed=0)
    assert encoder.layer2[0].bn2.weight.eq(0 if zero else 1).all()
    assert encoder.layer2[0].bn1.weight.eq(1).all()


def test_small_stem_keeps_the_resolution_of_small_images() -> None:
    encoder = build_encoder(EncoderConfig(architecture="resnet18", stem="small"), seed=0)
    shapes = []
    encoder.layer1.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, encoder.num_features)
    assert shapes == [(2, 64, 32, 32)]


@pytest.mark.parametrize("name", ["resnet5O", "vit_base_patch16_224", "resnet50.a1_in1k"])
def test_other_architectures_are_refused_with_close_names(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"encoder.architecture is '{name}'.*close: .*resnet"):
        build_encoder(EncoderConfig(architecture=name), seed=0)


def test_feature_channels_are_those_of_the_four_layers() -> None:
    resnet50 = build_encoder(EncoderConfig(architecture="resnet50"), 0)
    assert feature_channels(resnet50) == [256, 512, 1024, 2048]
    assert feature_channels(build_encoder(TINY, 0)) == [64, 128, 256, 512]


def test_backbone_normalises_and_holds_only_the_encoders_tensors() -> None:
    backbone = Backbone(build_encoder(TINY, 0), TINY, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.5))
    red = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    normalised = backbone.normalise(red)
    torch.testing.assert_close(normalised[0, :, 0, 0], torch.tensor([5.0, -2.0, -0.2]))
    assert backbone(normalised).shape == (2, backbone.num_features)
    assert all(name.startswith("encoder.") for name in backbone.state_dict())
