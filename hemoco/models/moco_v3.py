"""MoCo v3 for ResNets (Chen, Xie, He 2021, arXiv:2104.02057, section 3 and Algorithm 1).

Written from the paper and its appendix. The official code has a non-commercial licence; it was
not read.

Four things differ from v1 and v2 (`hemoco.models.moco`):

- **No queue.** The negatives of a query are the keys of the other images of the global batch,
  which must therefore be large (4096 in the paper).
- **A symmetric loss.** Each of the two views of an image is query once and key once; the losses of
  both directions are added.
- **A predictor**, an MLP behind the query encoder. The key encoder has none, hence the moving
  average leaves it out.
- **BN over all ranks** instead of shuffling: query and key are normalised with the whole batch.

One training step calls, in this order (the loop is `hemoco.train.pretrain`):

    update_key_encoder(m)           f_k = m * f_k + (1 - m) * f_q, without the predictor
    embed_keys(x1, x2)              k1, k2 = f_k(x1), f_k(x2), without gradient
    forward(keys, x1, x2)           q1, q2 = f_q(x1), f_q(x2); loss = ctr(q1, k2) + ctr(q2, k1)
    backward, optimiser step        update(f_q)
    finish_step(keys)               nothing

Algorithm 1 takes the moving average at the end of a step, here it begins the next one. The keys are
the same, as both encoders are equal before the first step.

Keys are gathered from all ranks without gradient. The loss of a rank is the mean over its own
queries, and DistributedDataParallel averages the gradients of all ranks.

Shapes: N images on this rank, G on all ranks, C embedding size, H x W the size of a view.
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
    """Query encoder with a predictor, and the query encoder's moving average, the key encoder."""

    symmetric = True
    """True if `forward` takes the key views too, to contrast them as queries."""

    def __init__(
        self, query_encoder: EmbeddingNetwork, predictor: nn.Module, config: MoCoV3Config
    ) -> None:
        """Copies the key encoder from the query encoder.

        Args:
            query_encoder: backbone and projector, trained by the optimiser.
            predictor: (N, C) -> (N, C), trained by the optimiser.
            config: settings of the method.
        """
        super().__init__()
        self.config = config
        self.query_encoder = query_encoder
        self.predictor = predictor
        self.key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)

    def key_order(self, step: int, global_batch_size: int) -> Tensor | None:
        """None: keys are embedded in the order of their images, as BN is over all of them."""
        return None

    @torch.no_grad()
    def embed_keys(self, first_views: Tensor, second_views: Tensor, order: Tensor | None) -> Tensor:
        """The keys of this rank's images, two for each.

        Args:
            first_views: (N, 3, H, W), normalised.
            second_views: (N, 3, H, W), normalised, the other views of the same images.
            order: not used.

        Returns:
            Unit vectors (N, 2, C): at [:, 0] the keys of the second views, which are the positives
            of the first views as queries; at [:, 1] those of the first views.
        """
        second_keys = functional.normalize(self.key_encoder(second_views), dim=1)  # (N, C)
        first_keys = functional.normalize(self.key_encoder(first_views), dim=1)  # (N, C)
        return torch.stack([second_keys, first_keys], dim=1)  # (N, 2, C)

    def forward(self, keys: Tensor, first_views: Tensor, second_views: Tensor) -> MoCoOutput:
        """Contrasts the queries of each view with the other view's keys of the global batch.

        Args:
            keys: (N, 2, C), from `embed_keys`.
            first_views: (N, 3, H, W), normalised.
            second_views: (N, 3, H, W), normalised, the other views of the same images.

        Returns:
            The loss of both directions; all other values are those of the first views as queries.
        """
        first_queries = self._embed_queries(first_views)  # (N, C)
        second_queries = self._embed_queries(second_views)  # (N, C)
        first = self._contrast(first_queries, keys[:, 0])
        second = self._contrast(second_queries, keys[:, 1])
        both = first._replace(loss=first.loss + second.loss)
        return MoCoOutput(both, first_queries, keys[:, 0])

    def finish_step(self, keys: Tensor) -> None:
        """Does nothing: there is no queue."""

    def update_key_encoder(self, momentum: float) -> None:
        """Moves the key encoder's parameters towards the query encoder's.

        The predictor has no counterpart. BN statistics are not averaged.
        """
        move_towards(self.key_encoder.parameters(), self.query_encoder.parameters(), momentum)

    def _embed_queries(self, views: Tensor) -> Tensor:
        return functional.normalize(self.predictor(self.query_encoder(views)), dim=1)  # (N, C)

    def _contrast(self, queries: Tensor, keys: Tensor) -> Contrast:
        all_keys = all_gather_cat(keys)  # (G, C)
        first_positive = rank() * len(queries)
        return batch_contrast(queries, all_keys, first_positive, self.config.temperature)
