"""Encoder with projection head, and the moving average that follows one (He et al. 2020, section 3.2).

Shapes: N images on this rank, C embedding size, F backbone features.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

Precision = Literal["float32", "bfloat16", "float16"]


class EmbeddingNetwork(nn.Module):
    """Encoder and head: images (N, 3, H, W) -> embeddings (N, C) in float32, of any length."""

    def __init__(self, encoder: nn.Module, head: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, C)."""
        images = images.contiguous(memory_format=torch.channels_last)
        lower = self.precision != "float32"
        with torch.autocast(images.device.type, getattr(torch, self.precision) if lower else None, enabled=lower):
            features = self.encoder(images)  # (N, F)
        embeddings: Tensor = self.head(features.float())
        return embeddings


@torch.no_grad()
def move_towards(followers: Iterable[Parameter], leaders: Iterable[Parameter], momentum: float) -> None:
    """follower = m follower + (1 - m) leader (eq. 2), in the parameters' own float32."""
    torch._foreach_lerp_(list[Tensor](followers), list[Tensor](leaders), 1 - momentum)
