"""MoCo v3 for ResNets (Chen, Xie, He 2021, arXiv:2104.02057): no queue, a predictor, both views as query and as key.

Written from the paper and its appendix; the official code was not read.

Shapes: N images on this rank, G on all ranks, C embedding size, D hidden size, F backbone features.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemoco.config import MoCoV3Config
from hemoco.distributed import all_gather_cat, rank
from hemoco.models.heads import EmbeddingNetwork, move_towards
from hemoco.models.info_nce import Contrast, batch_contrast
from hemoco.models.moco import MoCoOutput


class MoCoV3(nn.Module):
    """Query encoder with a predictor behind it, and the query encoder's moving average, the key encoder.

    One step is `update_key_encoder`, `embed_keys`, `forward`, backward, optimiser step, `finish_step`.
    """

    symmetric = True
    """Whether key views serve as queries, too."""

    def __init__(
        self, query_encoder: EmbeddingNetwork, predictor: nn.Module, config: MoCoV3Config
    ) -> None:
        super().__init__()
        self.config = config
        self.query_encoder = query_encoder
        self.predictor = predictor
        self.key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)

    def key_order(self, step: int, global_batch_size: int) -> None:
        """Keys come in the order of their queries: batch statistics are those of all images alike."""

    @torch.no_grad()
    def embed_keys(self, first_views: Tensor, second_views: Tensor, _: Tensor | None) -> Tensor:
        """The keys (N, 2, C) of this rank's images, unit vectors: those of the second views first.

        Args:
            first_views: (N, 3, H, W), normalised.
            second_views: (N, 3, H, W), the other views of the same images.
        """
        keys = [
            functional.normalize(self.key_encoder(views), dim=1)
            for views in (second_views, first_views)
        ]
        return torch.stack(keys, dim=1)

    def forward(self, keys: Tensor, first_views: Tensor, second_views: Tensor) -> MoCoOutput:
        """Contrasts the queries of each view with the keys of the other in the global batch; the losses add up.

        Args:
            keys: (N, 2, C) as `embed_keys` gives them.
            first_views: (N, 3, H, W), normalised.
            second_views: (N, 3, H, W), the other views of the same images.

        Returns:
            The loss of both directions, and all else of the first view as query.
        """
        queries, other_queries = self._queries(first_views), self._queries(second_views)
        contrast = self._contrast(queries, keys[:, 0])
        other = self._contrast(other_queries, keys[:, 1])
        return MoCoOutput(contrast._replace(loss=contrast.loss + other.loss), queries, keys[:, 0])

    def finish_step(self, keys: Tensor) -> None:
        """Keys are not kept."""

    def update_key_encoder(self, momentum: float) -> None:
        """Moves the key parameters towards the query's, not the predictor's; BN statistics stay the key encoder's."""
        move_towards(self.key_encoder.parameters(), self.query_encoder.parameters(), momentum)

    def _queries(self, views: Tensor) -> Tensor:
        return functional.normalize(self.predictor(self.query_encoder(views)), dim=1)  # (N, C)

    def _contrast(self, queries: Tensor, keys: Tensor) -> Contrast:
        first = rank() * len(queries)
        return batch_contrast(queries, all_gather_cat(keys), first, self.config.temperature)
