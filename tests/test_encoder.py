import pytest
import torch
import torchvision

from hemoco.config import EncoderConfig
from hemoco.encoder import Backbone, build_encoder, feature_channels
from hemoco.errors import ConfigError

TINY = EncoderConfig(architecture="resnet10t", stem="small")


def test_names_and_shapes_are_torchvisions() -> None:
    ours = build_encoder(EncoderConfig(architecture="resnet50"), seed=0).state_dict()
    theirs = torchvision.models.resnet50().state_dict()
    shapes = {name: tensor.shape for name, tensor in theirs.items() if not name.startswith("fc.")}
    assert {name: tensor.shape for name, tensor in ours.items()} == shapes


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
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_convolutions_are_kaiming_fan_out() -> None:
    weight = build_encoder(EncoderConfig(architecture="resnet18"), seed=0).layer4[1].conv2.weight
    expected = (2 / (512 * 9)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.01)  # 2.4 million draws


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
    assert feature_channels(build_encoder(EncoderConfig(architecture="resnet50"), 0)) == [256, 512, 1024, 2048]
    assert feature_channels(build_encoder(TINY, 0)) == [64, 128, 256, 512]


def test_backbone_normalises_and_holds_only_the_encoders_tensors() -> None:
    backbone = Backbone(build_encoder(TINY, 0), TINY, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.5))
    red = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    normalised = backbone.normalise(red)
    torch.testing.assert_close(normalised[0, :, 0, 0], torch.tensor([5.0, -2.0, -0.2]))
    assert backbone(normalised).shape == (2, backbone.num_features)
    assert all(name.startswith("encoder.") for name in backbone.state_dict())
