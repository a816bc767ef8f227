"""Encoder with its head, projection and prediction heads, and the moving average of parameters.

Sources: He et al. 2020 (arXiv:1911.05722), section 3.2; Chen et al. 2020 (arXiv:2003.04297) for
the MLP head of v2; Chen, Xie, He 2021 (arXiv:2104.02057) for projector and predictor of v3.

Shapes: N images on this rank, C embedding size, D hidden size, F backbone features, H x W a view.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from hemoco import foreach

Precision = Literal["float32", "bfloat16", "float16"]


class EmbeddingNetwork(nn.Module):
    """Encoder and head: images (N, 3, H, W) -> embeddings (N, C), float32 and not normalised.

    Only the encoder runs in a lower precision. The head stays in float32, as do the logits
    (docs/traps.md, 27).
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, C) of normalised images (N, 3, H, W)."""
        images = images.contiguous(memory_format=torch.channels_last)
        autocast = self.precision != "float32"
        dtype = getattr(torch, self.precision) if autocast else None
        with torch.autocast(images.device.type, dtype, enabled=autocast):
            features = self.encoder(images)  # (N, F)
        embeddings: Tensor = self.head(features.float())  # (N, C)
        return embeddings


@torch.no_grad()
def move_towards(
    averages: Iterable[Parameter], parameters: Iterable[Parameter], momentum: float
) -> None:
    """Updates a moving average: average = momentum * average + (1 - momentum) * parameter.

    Equation 2 of arXiv:1911.05722. Computed in the float32 of the parameters: in 16 bits a step of
    0.001 would be lost in rounding (docs/traps.md, 8).
    """
    foreach.lerp_(list[Tensor](averages), list[Tensor](parameters), 1 - momentum)


def build_head(
    kind: Literal["linear", "mlp", "mlp_bn"], features: int, embedding_size: int
) -> nn.Module:
    """The projection head (N, F) -> (N, C) of v1 (`linear`) or v2 (`mlp`), or v2's with BN."""
    if kind == "linear":
        return nn.Linear(features, embedding_size)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(features, features), nn.ReLU(), nn.Linear(features, embedding_size)
        )
    return nn.Sequential(
        nn.Linear(features, features, bias=False),  # BN has the bias
        nn.BatchNorm1d(features),
        nn.ReLU(),
        nn.Linear(features, embedding_size),
    )


def build_projector(features: int, hidden_size: int, embedding_size: int) -> nn.Module:
    """The projector of v3, (N, F) -> (N, D) -> (N, C); its last BN has no scale and no shift."""
    return nn.Sequential(
        *_hidden_layer(features, hidden_size),
        nn.Linear(hidden_size, embedding_size, bias=False),
        nn.BatchNorm1d(embedding_size, affine=False),
    )


def build_predictor(embedding_size: int, hidden_size: int) -> nn.Module:
    """The predictor of v3, (N, C) -> (N, D) -> (N, C); for ResNets it does not end in BN."""
    return nn.Sequential(
        *_hidden_layer(embedding_size, hidden_size),
        nn.Linear(hidden_size, embedding_size, bias=False),
    )


def _hidden_layer(size: int, hidden_size: int) -> tuple[nn.Module, ...]:
    return nn.Linear(size, hidden_size, bias=False), nn.BatchNorm1d(hidden_size), nn.ReLU()
