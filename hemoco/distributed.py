"""Collectives of the default process group; without one, the world is this process and they change nothing.

Shapes: N rows on this rank, G on all ranks.
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
    """Number of training processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_cat(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (N, ...) -> (G, ...); without gradient. N is the same on every rank."""
    if world_size() == 1:
        return tensor.detach()
    gathered = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])  # (G, ...)
    dist.all_gather_into_tensor(gathered, tensor.detach().contiguous())
    return gathered


def all_to_all(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Sends rows to all ranks and returns what they sent here, in rank order; without gradient.

    Args:
        rows: (sum(sent), ...), those for rank 0 first.
        sent: number of rows for each rank.
        received: number of rows from each rank.

    Returns:
        Rows (sum(received), ...), those from rank 0 first.
    """
    if world_size() == 1:
        return rows.detach()
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.detach().contiguous(), received, sent)
    return result


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over the ranks, equal on all of them; without gradient."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def sum_with_gradient(values: Tensor) -> Tensor:
    """As `sum_over_ranks`, with gradient: each rank's values get the sum of what the ranks' losses say of the sum."""
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
    """The element-wise mean over the ranks, equal on all of them; without gradient."""
    return sum_over_ranks(values) / world_size()


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank; what the others give is not used. It must pickle."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gather_objects(value: T) -> list[T]:
    """The values of all ranks in rank order, on every rank; they must pickle."""
    gathered = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def compute_on_all(compute: Callable[[], T]) -> list[T]:
    """What each rank computes, in rank order, on every rank.

    Raises:
        HemocoError: as the first rank that failed raised it, on all of them: none waits for one that is gone.
    """
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
    """The module to call instead of `model` so that backward averages gradients over the ranks."""
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        # its successor, forward_sync_buffers, is not in all the versions of torch we allow
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return torch.nn.parallel.DistributedDataParallel(
            model,
            # no device_ids: inputs are where they belong, and one that belongs on the CPU is not moved
            broadcast_buffers=False,  # BN statistics are each rank's own, and the queue is alike already
            gradient_as_bucket_view=True,
        )


def without_reduction(wrapped: torch.nn.Module) -> AbstractContextManager[None]:
    """Backward within it adds to this rank's gradients only; the next one outside it averages what came together."""
    if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
        found: AbstractContextManager[None] = wrapped.no_sync()
        return found
    return nullcontext()
