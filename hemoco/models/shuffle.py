"""Shuffling BN (He et al. 2020, section 3.3): keys are normalised in other company than their queries.

Batch normalisation takes its statistics over groups of images. The keys are computed in an order permuted over the
global batch, so that the groups of a query and of its key differ and statistics cannot give the positive away. The
group size is ours to choose, not the number of GPUs': one process computes what eight would.

Shapes: N images on this rank, G on all ranks, C channels.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from hemoco.distributed import all_to_all, rank, world_size


class SplitBatchNorm(_BatchNorm):
    """Batch normalisation of each `group_size` consecutive images by their own statistics.

    Takes (N, C) and (N, C, H, W). Running statistics follow the mean over the groups; evaluation and the names in the
    state are those of nn.BatchNorm2d.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, group_size: int) -> None:
        super().__init__(num_features)
        self.group_size = group_size

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, the shape unchanged; in training N must be a multiple of the group size."""
        if not self.training or len(images) == self.group_size:
            normalised: Tensor = super().forward(images)
            return normalised
        momentum, groups = self.momentum, torch.split(images, self.group_size)
        assert momentum is not None, "running statistics are moving averages"
        assert len(groups[-1]) == self.group_size, f"{len(images)} images do not fill groups of {self.group_size}"
        means, variances = (s.repeat(len(groups), 1) for s in (self.running_mean, self.running_var))  # (groups, C)
        outputs = [
            functional.batch_norm(group, mean, variance, self.weight, self.bias, True, momentum, self.eps)
            for group, mean, variance in zip(groups, means, variances, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(dim=0))
            self.running_var.copy_(variances.mean(dim=0))
            self.num_batches_tracked.add_(1)
        return torch.cat(outputs)

    def _check_input_dim(self, images: Tensor) -> None:
        assert images.ndim in (2, 4), f"expected (N, C) or (N, C, H, W), got {tuple(images.shape)}"


def split_batch_norms(module: nn.Module, group_size: int) -> None:
    """Replaces each batch normalisation below `module` by a SplitBatchNorm with its parameters and statistics."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            split = SplitBatchNorm(child.num_features, group_size)
            split.eps, split.momentum = child.eps, child.momentum
            split.load_state_dict(child.state_dict())
            setattr(module, name, split)
        else:
            split_batch_norms(child, group_size)


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
