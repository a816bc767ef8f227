"""Batch normalisation over groups of images other than those of one rank.

- `synchronise_batch_norms`: statistics over the images of all ranks, for MoCo v3, fine-tuning and
  detectors. On GPUs this is torch's SyncBatchNorm. That refuses CPU tensors, so
  `AllReduceBatchNorm` does the same there with two all-reduces.
- `split_batch_norms`: statistics over groups of fixed size, for MoCo v1 and v2 (`SplitBatchNorm`).
  The official code takes them over the images of one GPU; with groups of fixed size the result
  does not depend on the number of GPUs.

Shapes: N images on this rank, C channels, H x W a feature map.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

# the common base class of torch's batch normalisations has no public name;
# tests/unit/test_private_apis.py, test_batch_norm
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from hemoco.distributed import sum_with_gradient, world_size

__all__ = ["AllReduceBatchNorm", "BatchNorm", "SplitBatchNorm", "synchronise_batch_norms"]


class AllReduceBatchNorm(BatchNorm):
    """Batch normalisation over the images of all ranks, (N, C) or (N, C, H, W).

    Ranks may differ in N, H and W: every pixel counts the same, as in SyncBatchNorm.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images of the same shape and type; every rank must call it."""
        if not self.training or world_size() == 1:
            normalised: Tensor = super().forward(images)
            return normalised
        axes = [axis for axis in range(images.ndim) if axis != 1]
        per_channel = [1, -1, *[1] * (images.ndim - 2)]  # shape that broadcasts (C,)
        values = images.float()
        own_count = values.new_full((1,), values.numel() / values.shape[1])
        # one collective for sums and count
        sums = sum_with_gradient(torch.cat([values.sum(axes), own_count]))  # (C + 1,)
        count = sums[-1].detach()
        mean = sums[:-1] / count  # (C,)
        centred = values - mean.view(per_channel)
        # a second collective, for squares about the mean: the difference of mean square and squared
        # mean would lose a small variance beside a large mean in float32
        variance = sum_with_gradient(centred.square().sum(axes)) / count  # (C,)
        # detached here: the product would otherwise be part of the graph that backward walks
        self._update_running_statistics(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt()  # (C,)
        if self.affine:
            scale = scale * self.weight
        outputs = centred * scale.view(per_channel)
        if self.affine:
            outputs = outputs + self.bias.view(per_channel)
        return outputs.to(images.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.momentum is not None, "running statistics are moving averages"
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_variance, self.momentum)
        self.num_batches_tracked.add_(1)

    # called by the base class; test_private_apis.py, test_check_input_dim
    def _check_input_dim(self, images: Tensor) -> None:
        assert images.ndim in (2, 4), f"expected (N, C) or (N, C, H, W), got {tuple(images.shape)}"


def synchronise_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Replaces each batch normalisation below a module by one over the images of all ranks.

    Parameters and running statistics are kept, and so is whether the parameters are trained.
    """
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

    Takes (N, C) and (N, C, H, W). Running statistics follow the mean over the groups. In evaluation
    mode, and in the names of its state, it is nn.BatchNorm2d.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, group_size: int) -> None:
        super().__init__(num_features)
        self.group_size = group_size

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images of the same shape; in training N must be a multiple of the group size.

        The groups are normalised one after the other. The official CIFAR-10 notebook views them as
        more channels of fewer images; images that are channels-last in memory have no such view.
        """
        if not self.training or len(images) == self.group_size:
            normalised: Tensor = super().forward(images)
            return normalised
        assert self.momentum is not None, "running statistics are moving averages"
        groups = torch.split(images, self.group_size)
        assert len(groups[-1]) == self.group_size, (
            f"{len(images)} images do not fill groups of {self.group_size}"
        )
        # batch_norm updates the statistics in place: one copy for each group, (groups, C)
        means = self.running_mean.repeat(len(groups), 1)
        variances = self.running_var.repeat(len(groups), 1)
        outputs = [
            functional.batch_norm(
                group, mean, variance, self.weight, self.bias, True, self.momentum, self.eps
            )
            for group, mean, variance in zip(groups, means, variances, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(dim=0))
            self.running_var.copy_(variances.mean(dim=0))
            self.num_batches_tracked.add_(1)
        return torch.cat(outputs)

    # called by the base class; test_private_apis.py, test_check_input_dim
    def _check_input_dim(self, images: Tensor) -> None:
        assert images.ndim in (2, 4), f"expected (N, C) or (N, C, H, W), got {tuple(images.shape)}"


def split_batch_norms(module: nn.Module, group_size: int) -> None:
    """Replaces each batch normalisation below a module by a `SplitBatchNorm`.

    Parameters and running statistics are kept.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            split = SplitBatchNorm(child.num_features, group_size)
            split.eps = child.eps
            split.momentum = child.momentum
            split.load_state_dict(child.state_dict())
            setattr(module, name, split)
        else:
            split_batch_norms(child, group_size)
