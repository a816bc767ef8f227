"""The backbone that a transfer starts from, by the name of its init."""

import json

from hemoco.config import EncoderConfig, ViewsConfig, init_url
from hemoco.errors import ConfigError
from hemoco.models.resnet import Backbone, supervised_backbone
from hemoco.train.checkpoint import backbone_metadata, load_backbone, random_backbone


def init_backbone(init: str, backbone_url: str, encoder: EncoderConfig, views: ViewsConfig, seed: int) -> Backbone:
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


def check_architecture(url: str, encoder: EncoderConfig) -> None:
    """Refuses to compare backbones of different architectures: a larger network is no better pretraining.

    Args:
        url: of a backbone.
        encoder: the recipe's, which the random and the supervised baseline have.

    Raises:
        ConfigError: it has another architecture.
        CheckpointError: the file is no backbone.
    """
    metadata = backbone_metadata(url)
    shortcuts = str(json.loads(metadata.get("shortcuts", "true")))  # older files do not say so
    found = {"architecture": metadata["architecture"], "stem": metadata["stem"], "shortcuts": shortcuts}
    for name, value in found.items():
        wanted = str(getattr(encoder, name))
        if value != wanted:
            raise ConfigError(
                f"{url}: its {name} is {value}, the recipe's pretrain.encoder.{name} is {wanted}: backbones "
                f"are compared at equal size; set --pretrain.encoder.{name} {value} or give another one"
            )
