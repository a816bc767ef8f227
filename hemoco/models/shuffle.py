"""Shuffling BN (He et al. 2020, arXiv:1911.05722, section 3.3): another BN group for each key.

Batch normalisation takes its statistics over a group of images, so each embedding carries traces
of its group. If a query and its key were normalised in the same group, the encoder could match
them by these traces and ignore the image. The keys are therefore computed in an order that is
permuted over the global batch, and put back in place afterwards.

In the official code a group is the images of one GPU; the result then depends on the number of
GPUs, and on a single GPU shuffling has no effect. Here the size of a group is a setting
(`moco.bn_group_size`, see `hemoco.models.batch_norm.SplitBatchNorm`): one process computes what
eight would.

Shapes: N images on this rank, G on all ranks.
"""

import numpy as np
import torch
from torch import Tensor

from hemoco.distributed import all_to_all, rank, world_size


def shuffle_order(seed: int, step: int, count: int) -> Tensor:
    """The permutation (count,) of the global batch at a step, on the CPU.

    A pure function of its arguments, so that all ranks draw the same order without communication.
    """
    return torch.from_numpy(np.random.default_rng([seed, step]).permutation(count))


def permute_global(rows: Tensor, order: Tensor) -> Tensor:
    """This rank's part of the permuted global batch; `order.argsort()` undoes `order`.

    Each row travels once, to the rank that needs it; gathering would send every row to all ranks.

    Args:
        rows: (N, ...), rows [rank * N, (rank + 1) * N) of the global batch; no gradient flows.
        order: (G,) on the CPU, equal on all ranks; row i of the new global batch is row order[i]
            of the old one.

    Returns:
        Rows [rank * N, (rank + 1) * N) of the new global batch, (N, ...).
    """
    count = len(rows)
    ranks = world_size()
    senders = order // count  # (G,) rank that has the row of each new position
    receivers = torch.arange(len(order)) // count  # (G,) rank that owns each new position
    leaving = (senders == rank()).nonzero().squeeze(1)  # (N,) new positions of this rank's rows
    arriving = senders[rank() * count : (rank() + 1) * count]  # (N,) sender of each new row
    received = all_to_all(
        rows[(order[leaving] % count).to(rows.device)],
        sent=receivers[leaving].bincount(minlength=ranks).tolist(),
        received=arriving.bincount(minlength=ranks).tolist(),
    )  # (N, ...) by sender, then new position
    indices = arriving.argsort(stable=True).argsort()  # (N,) of each new row in `received`
    return received[indices.to(rows.device)]
