"""The backbone that a transfer starts from, selected by the name of its init."""

import json
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from hemoco.backbones.file import load_backbone, random_backbone
from hemoco.config import EncoderConfig, ViewsConfig, init_url
from hemoco.errors import ConfigError
from hemoco.models.resnet import Backbone, check_timm_architecture


def init_backbone(
    init: str, backbone_url: str, encoder: EncoderConfig, views: ViewsConfig, seed: int
) -> Backbone:
    """Makes the backbone for an init, in evaluation mode on the CPU.

    Args:
        init: `pretrained`, `random`, `supervised`, or `NAME=URL`.
        backbone_url: URL of the backbone for `pretrained`.
        encoder: architecture of the backbone for `random` and `supervised`.
        views: views of the pretraining, whose normalisation `random` gets.
        seed: seed of the weights for `random`.

    Raises:
        CheckpointError: a file is not a backbone.
        ConfigError: timm's weights are not available.
    """
    if init == "random":
        return random_backbone(encoder, seed, views.mean, views.std)
    if init == "supervised":
        return supervised_backbone(encoder)
    return load_backbone(backbone_url if init == "pretrained" else init_url(init))


def check_architecture(url: str, metadata: Mapping[str, str], encoder: EncoderConfig) -> None:
    """Refuses a backbone whose architecture differs from that of the recipe.

    The random and the supervised baseline have the recipe's architecture. Against another one, a
    difference would come from the size of the network and not from the pretraining.

    Args:
        url: URL of the backbone, for messages.
        metadata: metadata of the backbone.
        encoder: architecture of the recipe.

    Raises:
        ConfigError: the architectures differ.
    """
    given = {
        "architecture": metadata["architecture"],
        "stem": metadata["stem"],
        "shortcuts": str(json.loads(metadata.get("shortcuts", "true"))),  # missing in older files
    }
    for name, value in given.items():
        wanted = str(getattr(encoder, name))
        if value != wanted:
            raise ConfigError(
                f"{url}: its {name} is {value}, the recipe's pretrain.encoder.{name} is {wanted}: "
                "backbones are compared at equal size; set "
                f"--pretrain.encoder.{name} {value} or give another one"
            )


def supervised_backbone(config: EncoderConfig) -> Backbone:
    """Downloads timm's supervised weights of an architecture; returns them in evaluation mode.

    If timm has them, torchvision's weights of its first training recipe (tag tv_in1k) are used, the
    baseline of the papers; timm's own weights were trained longer.

    Raises:
        ConfigError: there are no weights, they do not fit the encoder, or the download failed.
    """
    check_timm_architecture(config.architecture)
    check_supervised(config)
    try:
        tagged = f"{config.architecture}.tv_in1k"
        has_tagged = tagged in timm.list_pretrained(f"{config.architecture}.*")
        encoder: nn.Module = timm.create_model(
            tagged if has_tagged else config.architecture, pretrained=True, num_classes=0
        )
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"timm's supervised weights of {config.architecture} are not available ({reason}); if "
            "this machine cannot download them, get the file elsewhere, run `python -m jobs import "
            "FILE DEST` and name it in transfers.inits as supervised_file=DEST"
        ) from error
    pretrained_cfg: Any = encoder.pretrained_cfg  # timm's, with the normalisation of the weights
    return Backbone(encoder, config, pretrained_cfg["mean"], pretrained_cfg["std"]).eval()


def check_supervised(config: EncoderConfig) -> None:
    """Refuses an encoder for which timm has no supervised weights.

    Raises:
        ConfigError: the encoder has the small stem, or no shortcuts.
    """
    if config.stem != "imagenet" or not config.shortcuts:
        raise ConfigError(
            f"timm's supervised weights are of the plain {config.architecture}, not of one with "
            "the small stem or without shortcuts; leave `supervised` out of transfers.inits"
        )
