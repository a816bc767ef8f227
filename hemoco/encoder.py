"""The encoders: timm's ResNets, with the small-image stem and a seeded initialisation.

Shapes: N images, F features, H and W height and width.
"""

import contextlib
import difflib
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn

from hemoco.config import EncoderConfig
from hemoco.errors import ConfigError


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules built within draw their weights from this seed; the global generators stay as they were."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the CUDA generators too, which are not forked here
        torch.default_generator.manual_seed(seed)
        yield


def build_encoder(config: EncoderConfig, seed: int) -> nn.Module:
    """A freshly initialised ResNet without classifier, (N, 3, H, W) -> (N, F); `.num_features` is F.

    Convolutions are Kaiming normal, fan-out (He et al. 2015), as in torchvision. The same seed gives the same weights
    on every rank.

    Raises:
        ConfigError: the architecture is not a ResNet that timm knows.
    """
    _check_architecture(config.architecture)
    with seeded(seed):
        encoder: nn.Module = timm.create_model(
            config.architecture, pretrained=False, num_classes=0, zero_init_last=config.zero_init_last
        )
        if config.stem == "small":
            _use_small_stem(encoder)
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return encoder


def feature_channels(encoder: nn.Module) -> list[int]:
    """Channels of the outputs of layer1 to layer4, for a feature pyramid."""
    levels: list[dict[str, int | str]] = encoder.feature_info  # type: ignore[assignment]
    return [int(level["num_chs"]) for level in levels if str(level["module"]).startswith("layer")]


class Backbone(nn.Module):
    """An encoder and all that is needed to use it: its config and the normalisation of its images."""

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
        # not persistent: the numbers are part of a file's metadata, its tensors are the encoder's alone
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def num_features(self) -> int:
        """F, size of a feature."""
        return int(self.encoder.num_features)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, F) of normalised images (N, 3, H, W)."""
        features: Tensor = self.encoder(images)
        return features

    def normalise(self, images: Tensor) -> Tensor:
        """Input of `forward` from uint8 RGB images (N, 3, H, W), on the backbone's device."""
        scaled = images.to(self.pixel_mean.device).float() / 255
        return (scaled - self.pixel_mean) / self.pixel_std


def _check_architecture(name: str) -> None:
    resnets = timm.list_models(module="resnet")
    if name not in resnets:
        close = difflib.get_close_matches(name, resnets, n=3) or ["resnet18", "resnet50"]
        raise ConfigError(
            f"encoder.architecture is {name!r}: it must be one of timm's ResNets; close: {', '.join(close)}"
        )


def _use_small_stem(encoder: nn.Module) -> None:
    """Keeps the resolution of small images: one 3x3 convolution of stride 1, no max-pooling."""
    channels: int = encoder.bn1.num_features  # type: ignore[union-attr,assignment]
    encoder.conv1 = nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
    encoder.maxpool = nn.Identity()
