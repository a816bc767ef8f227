"""Shuffling BN (He et al. 2020, section 3.3): keys are normalised in other company than their queries.

Batch normalisation takes its statistics over groups of images. The keys are computed in an order permuted over the
global batch, so that the groups of a query and of its key differ and statistics cannot give the positive away. The
group size is ours to choose, not the number of GPUs': one process computes what eight would.

Shapes: N images on this rank, G on all ranks, C channels.
"""

import numpy as np
import torch
from torch import Tensor

from hemoco.distributed import all_to_all, rank, world_size


def shuffle_order(seed: int, step: int, count: int) -> Tensor:
    """The permutation (count,) of the global batch at one step: a pure function, so all ranks draw the same."""
    return torch.from_numpy(np.random.default_rng([seed, step]).permutation(count))


def permute_global(rows: Tensor, order: Tensor) -> Tensor:
    """This rank's part of the global batch in another order; each row travels once. `order.argsort()` undoes it.

    Args:
        rows: (N, ...), rows [rank * N, (rank + 1) * N) of the global batch; no gradient flows.
        order: (G,) on the CPU, equal on all ranks; row i of the new global batch is row order[i] of the old one.

    Returns:
        Rows [rank * N, (rank + 1) * N) of the new global batch, (N, ...).
    """
    count, ranks = len(rows), world_size()
    mine = slice(rank() * count, (rank() + 1) * count)
    owners = order // count  # (G,) the rank that has each row
    takers = torch.arange(len(order)) // count  # (G,) the rank that wants it
    leaving = (owners == rank()).nonzero().squeeze(1)  # (N,) by taker, then place
    wanted = owners[mine]  # (N,)
    received = all_to_all(
        rows[(order[leaving] % count).to(rows.device)],
        sent=takers[leaving].bincount(minlength=ranks).tolist(),
        received=wanted.bincount(minlength=ranks).tolist(),
    )  # (N, ...) by owner, then place
    places = wanted.argsort(stable=True).argsort()
    return received[places.to(rows.device)]
