"""Encoders: timm's ResNets, with a stem for small images, plain counterparts and seeded weights.

A backbone is the `Backbone` of this module: an encoder, its config and its normalisation.

Shapes: N images, F features, H x W an image, O and I output and input channels, h x w a kernel.
"""

import contextlib
import difflib
from collections.abc import Iterator

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from hemoco.config import EncoderConfig
from hemoco.errors import ConfigError


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules built in the block draw their weights from this seed.

    The state of the global generators is restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the CUDA generators, which fork_rng does not restore
        # here: forking them would start CUDA in processes that never use it
        torch.default_generator.manual_seed(seed)
        yield


def build_encoder(config: EncoderConfig, seed: int) -> nn.Module:
    """A new ResNet without classifier, (N, 3, H, W) -> (N, F); its `num_features` is F.

    By default the convolutions are Kaiming normal, fan-out (He et al. 2015), as in torchvision.
    The same seed gives the same weights on every rank. A plain network gets the weights of its
    residual counterpart.

    Raises:
        ConfigError: the architecture is not one of timm's ResNets.
    """
    check_timm_architecture(config.architecture)
    with seeded(seed):
        encoder: nn.Module = timm.create_model(
            config.architecture,
            pretrained=False,
            num_classes=0,
            zero_init_last=config.zero_init_last,
        )
        if config.stem == "small":
            use_small_stem(encoder)
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                init_convolution(module, config)
    if not config.shortcuts:
        remove_shortcuts(encoder)
    return encoder


def init_convolution(convolution: nn.Conv2d, config: EncoderConfig) -> None:
    """Draws new weights (O, I, h, w) from a normal distribution of mean 0; a bias is not changed.

    With fan_in = I h w and fan_out = O h w the standard deviation is

    - `kaiming`: sqrt(g / fan), where g is 2 before a ReLU and 1 otherwise (He et al. 2015,
      arXiv:1502.01852, section 2.2);
    - `xavier`: sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010, equation 12; theirs is
      uniform).
    """
    if config.init == "xavier":
        nn.init.xavier_normal_(convolution.weight)
    else:
        nn.init.kaiming_normal_(
            convolution.weight, mode=config.fan_mode, nonlinearity=config.nonlinearity
        )


def remove_shortcuts(encoder: nn.Module) -> None:
    """Turns a ResNet into its plain counterpart, without identity and projection shortcuts.

    He et al. 2016 (arXiv:1512.03385), section 3.3. All other parameters keep their names.
    """
    for module in encoder.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            module.downsample = _NoShortcut()


def use_small_stem(encoder: nn.Module) -> None:
    """Replaces the stem by a 3x3 convolution of stride 1 without max-pooling, for small images."""
    channels: int = encoder.bn1.num_features  # type: ignore[union-attr,assignment]
    encoder.conv1 = nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
    encoder.maxpool = nn.Identity()


def feature_channels(encoder: nn.Module) -> list[int]:
    """Numbers of channels of the outputs of layer1 to layer4, for a feature pyramid."""
    levels: list[dict[str, int | str]] = encoder.feature_info  # type: ignore[assignment]
    return [int(level["num_chs"]) for level in levels if str(level["module"]).startswith("layer")]


class Backbone(nn.Module):
    """An encoder with all that is needed to use it: its config and the normalisation of images.

    Its state dict holds the encoder's tensors only, under the prefix `encoder.`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        config: EncoderConfig,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        self.mean = mean
        self.std = std
        # not persistent: a backbone file has them as metadata, and the encoder's tensors alone
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def num_features(self) -> int:
        """F, the number of features of an image."""
        return int(self.encoder.num_features)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, F) of normalised images (N, 3, H, W)."""
        features: Tensor = self.encoder(images)
        return features

    def normalise(self, images: Tensor) -> Tensor:
        """Normalises uint8 RGB images (N, 3, H, W) for `forward`, on the backbone's device."""
        scaled = images.to(self.pixel_mean.device).float() / 255
        return (scaled - self.pixel_mean) / self.pixel_std


def check_timm_architecture(name: str) -> None:
    """Raises ConfigError, with similar names, unless timm has a ResNet of this name."""
    resnets = timm.list_models(module="resnet")
    if name not in resnets:
        close = difflib.get_close_matches(name, resnets, n=3) or ["resnet18", "resnet50"]
        raise ConfigError(
            f"encoder.architecture is {name!r}: it must be one of timm's ResNets; "
            f"close: {', '.join(close)}"
        )


class _NoShortcut(nn.Module):
    """Takes the place of the shortcut's projection in timm's blocks, so that they add 0."""

    def forward(self, block_input: Tensor) -> Tensor:
        return block_input.new_zeros(())
