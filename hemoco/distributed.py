"""Collectives of the default process group.

Without a process group the world size is 1 and every collective returns its input, so the same
code runs in one process, under torchrun and under Ray.

Shapes: N rows on this rank, G rows over all ranks.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hemoco.errors import HemocoError

T = TypeVar("T")


def world_size() -> int:
    """The number of training processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_cat(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (N, ...) -> (G, ...), without gradient.

    N must be the same on every rank.
    """
    if world_size() == 1:
        return tensor.detach()
    gathered = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])  # (G, ...)
    dist.all_gather_into_tensor(gathered, tensor.detach().contiguous())
    return gathered


def all_to_all(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Sends rows to every rank and returns the rows received from them, without gradient.

    Args:
        rows: (sum(sent), ...), in the order of the receiving ranks.
        sent: number of rows for each rank.
        received: number of rows from each rank.

    Returns:
        Rows (sum(received), ...), in the order of the sending ranks.
    """
    if world_size() == 1:
        return rows.detach()
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.detach().contiguous(), received, sent)
    return result


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over the ranks, equal on all of them, without gradient."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def sum_with_gradient(values: Tensor) -> Tensor:
    """The element-wise sum over the ranks, with gradient.

    The sum enters the loss of every rank, so backward sums the ranks' gradients of the sum.
    """
    summed: Tensor = _Sum.apply(values) if world_size() > 1 else values
    return summed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.contiguous())


def mean_over_ranks(values: Tensor) -> Tensor:
    """The element-wise mean over the ranks, equal on all of them, without gradient."""
    return sum_over_ranks(values) / world_size()


def broadcast_object(value: T) -> T:
    """Returns rank 0's value on every rank; it must pickle, and the others' values are ignored."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gather_objects(value: T) -> list[T]:
    """Returns the values of all ranks in rank order, on every rank; they must pickle."""
    gathered = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def compute_on_all(compute: Callable[[], T]) -> list[T]:
    """Runs `compute` on every rank and returns all results in rank order, on every rank.

    Raises:
        HemocoError: the error of the first rank that failed, raised on all ranks.
    """
    # An error travels through the gather like a result. If the failing rank raised at once, the
    # others would wait for it in the gather until the process group times out.
    mine: T | HemocoError
    try:
        mine = compute()
    except HemocoError as error:
        mine = error
    results = []
    for result in gather_objects(mine):
        if isinstance(result, HemocoError):
            raise result
        results.append(result)
    return results


def wrap_for_gradients(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the module to call in place of `model`, so that backward averages gradients."""
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        # The replacement, forward_sync_buffers, is missing in the oldest torch that we allow.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return torch.nn.parallel.DistributedDataParallel(
            model,
            # No device_ids: with them DDP moves all inputs to the GPU, even those meant for the CPU
            # No broadcast: BN statistics are per rank, and the queue is the same on all already
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def without_reduction(wrapped: torch.nn.Module) -> AbstractContextManager[None]:
    """A context in which backward accumulates gradients on this rank only.

    The next backward outside the context averages all that was accumulated over the ranks.
    """
    if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
        no_sync: AbstractContextManager[None] = wrapped.no_sync()
        return no_sync
    return nullcontext()
