"""Batch normalisation over other images than the ones of one rank: over all ranks, or over groups of fixed size.

MoCo v3, fine-tuning and detectors take their statistics over the images of all ranks; MoCo v1 and v2 over groups
(`SplitBatchNorm`), so that the number of GPUs does not change the result.

On GPUs it is torch's SyncBatchNorm. That refuses the CPU, where `AllReduceBatchNorm` does the same with two plain
collectives.

Shapes: N images on this rank, C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from hemoco.distributed import sum_with_gradient, world_size

__all__ = ["AllReduceBatchNorm", "BatchNorm", "SplitBatchNorm", "synchronise_batch_norms"]
# BatchNorm is the base of all batch normalisations of torch, which has no public name


class AllReduceBatchNorm(BatchNorm):
    """Batch normalisation over the images of all ranks, (N, C) or (N, C, H, W); ranks may differ in N, H and W."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, the shape unchanged."""
        if not self.training or world_size() == 1:
            normalised: Tensor = super().forward(images)
            return normalised
        over = [axis for axis in range(images.ndim) if axis != 1]
        shape = [1, -1, *[1] * (images.ndim - 2)]
        values = images.float()
        mine = values.new_full((1,), values.numel() / values.shape[1])
        sums = sum_with_gradient(torch.cat([values.sum(over), mine]))  # (C + 1,)
        count = sums[-1].detach()
        mean = sums[:-1] / count  # (C,)
        centred = values - mean.view(shape)
        # from the mean, not from the sum of squares: float32 would lose a small variance beside a large mean
        variance = sum_with_gradient(centred.square().sum(over)) / count  # (C,)
        self._follow(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        outputs = centred * scale.view(shape)
        if self.affine:
            outputs = outputs + self.bias.view(shape)
        return outputs.to(images.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.momentum is not None, "running statistics are moving averages"
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)

    def _check_input_dim(self, images: Tensor) -> None:
        assert images.ndim in (2, 4), f"expected (N, C) or (N, C, H, W), got {tuple(images.shape)}"


def synchronise_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Replaces each batch normalisation below `module` by one over all ranks with its parameters and statistics."""
    kind = nn.SyncBatchNorm if device.type == "cuda" else AllReduceBatchNorm
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            synchronised = kind(child.num_features, child.eps, child.momentum, child.affine)
            synchronised.load_state_dict(child.state_dict())
            synchronised.requires_grad_(all(p.requires_grad for p in child.parameters()))
            setattr(module, name, synchronised)
        else:
            synchronise_batch_norms(child, device)


class SplitBatchNorm(BatchNorm):
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
        assert len(groups[-1]) == self.group_size, (
            f"{len(images)} images do not fill groups of {self.group_size}"
        )
        means, variances = (
            s.repeat(len(groups), 1) for s in (self.running_mean, self.running_var)
        )  # (groups, C)
        outputs = [
            functional.batch_norm(
                group, mean, variance, self.weight, self.bias, True, momentum, self.eps
            )
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
