"""Builds the method of a config, with its initial weights.

Both methods have the interface that the training loop uses: `key_order`, `embed_keys`, `forward`,
`finish_step`, `update_key_encoder`, `symmetric`. A new method is one more class in the union.

Shapes: F backbone features.
"""

import torch
from torch import nn

from hemoco.config import MoCoConfig, PretrainConfig
from hemoco.errors import ConfigError
from hemoco.models.batch_norm import split_batch_norms, synchronise_batch_norms
from hemoco.models.heads import EmbeddingNetwork, build_head, build_predictor, build_projector
from hemoco.models.moco import MoCo
from hemoco.models.moco_v3 import MoCoV3
from hemoco.models.resnet import build_encoder, seeded

Method = MoCo | MoCoV3


def build_method(config: PretrainConfig, device: torch.device) -> Method:
    """The method on a device; a function of the config alone, hence the same on every rank.

    Raises:
        ConfigError: the architecture is unknown, or one BN group holds the whole global batch, so
            that shuffling the keys would have no effect.
    """
    encoder = build_encoder(config.encoder, config.seed)
    features = int(encoder.num_features)  # type: ignore[arg-type]
    moco = config.moco
    method: Method
    if isinstance(moco, MoCoConfig):
        if moco.bn_group_size == config.global_batch_size:
            raise ConfigError(
                f"pretrain.moco.bn_group_size is {moco.bn_group_size}: it must be smaller than "
                f"pretrain.global_batch_size ({config.global_batch_size}), otherwise shuffling "
                "cannot separate a key from its query"
            )
        with seeded(config.seed + 1):
            head = build_head(moco.head, features, moco.embedding_size)
        network = EmbeddingNetwork(encoder, head, config.precision)
        split_batch_norms(network, moco.bn_group_size)
        method = MoCo(network, moco, config.seed)
    else:
        with seeded(config.seed + 1):
            head = build_projector(features, moco.hidden_size, moco.embedding_size)
            predictor = build_predictor(moco.embedding_size, moco.hidden_size)
        network = EmbeddingNetwork(encoder, head, config.precision)
        method = MoCoV3(network, predictor, moco)
        synchronise_batch_norms(method, device)
    if config.compile:
        # in place: the wrapper that torch.compile returns would rename all tensors of a checkpoint
        method.query_encoder.encoder.compile()
        method.key_encoder.encoder.compile()
    method.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return method


def trained_parameters(method: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimiser updates: all but the key encoder's."""
    return [parameter for parameter in method.parameters() if parameter.requires_grad]
