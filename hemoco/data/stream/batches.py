"""The global batches of a training: one rank's part of each, on its device.

Shapes: N images on this rank, V crops of each, S x S pixels a crop.
"""

import itertools
import logging
import time
from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from hemoco.config import PretrainConfig
from hemoco.data.shards.index import ShardColumns, ShardIndex
from hemoco.data.stream.bad_samples import BadSampleFile, BadSampleLimit, ReadCounts, sum_counts
from hemoco.data.stream.loader import (
    CropBatch,
    CropPlan,
    CropSource,
    StreamPosition,
    epoch_order,
    start_loader,
)
from hemoco.errors import HemocoError

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """One rank's part of a global batch, on the device."""

    crops: Tensor
    """uint8 (N, V, 3, S, S), not yet augmented; in pretraining V = 2, query and key."""
    keys: list[str]
    """Key of each image."""
    position: StreamPosition
    reading: ReadCounts = ReadCounts()
    """Counts of what this rank read since the batch before."""
    labels: tuple[int, ...] = ()
    """Label of each image, -1 where there is none."""


def pretraining_plan(config: PretrainConfig) -> CropPlan:
    """The batches of a pretraining run: two crops of each image."""
    return CropPlan(
        seed=config.seed,
        epochs=config.epochs,
        global_batch_size=config.global_batch_size,
        views=config.views,
        crops=2,
        stream=config.stream,
    )


def steps_per_epoch(index: ShardIndex, split: str, plan: CropPlan) -> int:
    """Global batches in an epoch of a split, the same in every epoch and on every rank.

    Raises:
        ConfigError: the split has fewer samples than one global batch.
        ShardError: there is no such split.
    """
    return epoch_order(ShardColumns(index.split(split)).samples, plan, epoch=0).steps


def batches(
    data_url: str,
    index: ShardIndex,
    split: str,
    plan: CropPlan,
    *,
    rank: int,
    world_size: int,
    start: StreamPosition | None,
    device: torch.device,
    bad_samples: BadSampleFile,
) -> Generator[Batch, None, None]:
    """This rank's batches from after the position `start` to the end of the last epoch.

    A batch is a function of data, plan, position and rank. The global batch depends neither on the
    world size nor on the number of loader processes. A bad sample is replaced by the next good one
    of its shard and reported in `Batch.reading`. Closing the generator ends the loader processes.

    Args:
        data_url: URL of the shard folder.
        index: its index.
        split: name of the split.
        plan: order and crops.
        rank: rank of this process.
        world_size: number of ranks.
        start: position of the last batch consumed; None starts at the beginning.
        device: receives the crops.
        bad_samples: receives the bad samples of this rank; the caller writes it.

    Raises:
        ConfigError: the split is smaller than a global batch, or the open shards exceed the memory
            allowed.
        ShardError: a shard is missing or was replaced, or too many images are bad.
        StorageError: the storage refuses, or did not answer in time.
        LostLoaderError: a loader process was killed.
        TrainingError: memory or /dev/shm ran out.
    """
    size, stream = plan.global_batch_size, plan.stream
    slots = (size * rank // world_size, size * (rank + 1) // world_size)
    shards = ShardColumns(index.split(split))
    source = CropSource(data_url, shards, plan, slots=slots, start=start)
    limit = BadSampleLimit(stream.max_bad_share)
    if world_size * source.parts > stream.lanes:  # then some processes share the shards of a lane
        processes = f"{world_size} x {source.parts}"
        logger.warning(
            "event=shards_read_twice loader_processes=%s lanes=%d", processes, stream.lanes
        )
    left_out = epoch_order(shards.samples, plan, epoch=0).left_out
    if rank == 0:
        logger.info(
            "event=stream split=%s samples=%d global_batch_size=%d left_out_per_epoch=%d",
            split,
            shards.samples.sum(),
            size,
            left_out,
        )
    loaded = iter(source) if stream.workers == 0 else iter(start_loader(source, device))
    try:
        began = time.perf_counter()
        while parts := list(itertools.islice(loaded, source.parts)):  # those of one step
            waited = ReadCounts(wait_s=time.perf_counter() - began)
            batch = _join(parts, waited, device)
            bad_samples.add(batch.reading.bad)
            limit.add(batch.reading)
            yield batch
            began = time.perf_counter()
    finally:
        # Ends the loader processes now. If left to the garbage collector, torch waits for each of
        # them for seconds, in vain.
        del loaded


def _join(parts: list[CropBatch | HemocoError], waited: ReadCounts, device: torch.device) -> Batch:
    """The rank's batch from the parts of its loader processes, in the order of the slots."""
    sound: list[CropBatch] = []
    for part in parts:
        if isinstance(part, HemocoError):
            raise part
        sound.append(part)
    crops = torch.cat([part.crops.to(device, non_blocking=True) for part in sound])
    return Batch(
        crops=crops,  # (N, V, 3, S, S)
        keys=[key for part in sound for key in part.keys],
        position=sound[0].position,
        reading=sum_counts([waited, *(part.reading for part in sound)]),
        labels=tuple(label for part in sound for label in part.labels),
    )
