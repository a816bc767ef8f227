"""The backbone that a transfer starts from, by the name of its init."""

import json
from collections.abc import Mapping

import timm
from torch import nn

from hemoco.backbones.file import load_backbone, random_backbone
from hemoco.config import EncoderConfig, ViewsConfig, init_url
from hemoco.errors import ConfigError
from hemoco.models.resnet import Backbone, check_timm_architecture


def init_backbone(
    init: str, backbone_url: str, encoder: EncoderConfig, views: ViewsConfig, seed: int
) -> Backbone:
    """A backbone in evaluation mode on the CPU.

    Args:
        init: `pretrained`, `random`, `supervised`, or `NAME=URL`.
        backbone_url: of the pretrained one.
        encoder: of the random and the supervised one.
        views: of the pretraining, for the normalisation of the random one.
        seed: of the random one.

    Raises:
        CheckpointError: a file is no backbone.
        ConfigError: timm's weights cannot be had.
    """
    if init == "random":
        return random_backbone(encoder, seed, views.mean, views.std)
    if init == "supervised":
        return supervised_backbone(encoder)
    return load_backbone(backbone_url if init == "pretrained" else init_url(init))


def check_architecture(url: str, metadata: Mapping[str, str], encoder: EncoderConfig) -> None:
    """Refuses to compare backbones of different architectures: a larger network is no better pretraining.

    Args:
        url: of a backbone, for messages.
        metadata: of that backbone.
        encoder: the recipe's, which the random and the supervised baseline have.

    Raises:
        ConfigError: it has another architecture.
    """
    shortcuts = str(json.loads(metadata.get("shortcuts", "true")))  # older files do not say so
    found = {
        "architecture": metadata["architecture"],
        "stem": metadata["stem"],
        "shortcuts": shortcuts,
    }
    for name, value in found.items():
        wanted = str(getattr(encoder, name))
        if value != wanted:
            raise ConfigError(
                f"{url}: its {name} is {value}, the recipe's pretrain.encoder.{name} is {wanted}: backbones "
                f"are compared at equal size; set --pretrain.encoder.{name} {value} or give another one"
            )


def supervised_backbone(config: EncoderConfig) -> Backbone:
    """The architecture with the supervised weights that timm has for it, in evaluation mode; they are downloaded.

    They are torchvision's of its first recipe (tag tv_in1k) where timm has them, as the papers' baseline; timm's own
    are trained longer.

    Raises:
        ConfigError: there are none, they do not fit the stem, or they cannot be reached.
    """
    check_timm_architecture(config.architecture)
    check_supervised(config)
    try:
        encoder: nn.Module = timm.create_model(
            _supervised_name(config.architecture), pretrained=True, num_classes=0
        )
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"timm's supervised weights of {config.architecture} cannot be had ({' '.join(str(error).split())[:200]}); "
            "where there is no way to them, `python -m jobs import FILE DEST` a file of them and name it in "
            "transfers.inits as supervised_file=DEST"
        ) from error
    described: dict[str, tuple[float, float, float]] = encoder.pretrained_cfg  # type: ignore[assignment]
    return Backbone(encoder, config, described["mean"], described["std"]).eval()


def check_supervised(config: EncoderConfig) -> None:
    """Refuses what timm's supervised weights cannot fit.

    Raises:
        ConfigError: the small stem, or no shortcuts.
    """
    if config.stem != "imagenet" or not config.shortcuts:
        raise ConfigError(
            f"timm's supervised weights are of the plain {config.architecture}: not of the small stem, and not without "
            "shortcuts; leave `supervised` out of transfers.inits"
        )


def _supervised_name(architecture: str) -> str:
    tagged = f"{architecture}.tv_in1k"
    return tagged if tagged in timm.list_pretrained(f"{architecture}.*") else architecture
