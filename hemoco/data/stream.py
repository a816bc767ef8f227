"""Batches of two views from shards, and labelled images for evaluation.

Loader processes decode and crop to uint8; the rest of the augmentation runs batched on the device. A rank's slots of a
global batch are split over its loader processes, each reading only the shards of its own lanes.

Shapes: N images on this rank, S x S a view, M images of a split, B of an evaluation batch.
"""

import functools
import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hemoco.config import PretrainConfig
from hemoco.data.counts import BadSampleFile, BadSampleLimit, ReadCounts, sum_counts
from hemoco.data.decode import decode_image
from hemoco.data.order import EpochOrder
from hemoco.data.portions import plan_portions
from hemoco.data.reader import SampleReader
from hemoco.data.shard_cache import ShardCache
from hemoco.data.shards import Shard, ShardColumns, ShardIndex, read_index, read_shard
from hemoco.data.views import augment, center_view, draw_colours, draw_crops, two_crops
from hemoco.errors import ConfigError, HemocoError, ShardError
from hemoco.storage import home

logger = logging.getLogger(__name__)

_PREFETCHED_STEPS = 2
_PATIENCE_S = 600.0  # of evaluation


class StreamPosition(NamedTuple):
    """The batch just delivered; the next one follows it."""

    epoch: int
    step: int


class CropBatch(NamedTuple):
    """What one loader process makes of a global batch."""

    crops: Tensor
    """uint8 (slots, 2, 3, S, S)."""
    keys: list[str]
    position: StreamPosition
    slots: tuple[int, int]
    """First and last (exclusive) slot in the global batch."""
    reading: ReadCounts


class Batch(NamedTuple):
    """One rank's part of a global batch, on the device."""

    query_views: Tensor
    """float32 (N, 3, S, S), normalised."""
    key_views: Tensor
    """float32 (N, 3, S, S), normalised; row i shows the image of query i."""
    keys: list[str]
    position: StreamPosition
    reading: ReadCounts = ReadCounts()
    """What was read since the batch before, on this rank."""


def steps_per_epoch(index: ShardIndex, split: str, config: PretrainConfig) -> int:
    """Global batches in an epoch of a split, the same in every epoch and on every rank.

    Raises:
        ConfigError: the split has fewer samples than one global batch.
        ShardError: there is no such split.
    """
    return _epoch_order(ShardColumns(index.split(split)).samples, config, epoch=0).steps


def batches(
    data_url: str,
    split: str,
    *,
    config: PretrainConfig,
    rank: int,
    world_size: int,
    start: StreamPosition | None,
    epochs: int,
    device: torch.device,
    bad_samples: BadSampleFile,
) -> Generator[Batch, None, None]:
    """This rank's batches after the position `start` to the end of the last epoch.

    A batch is a function of data, config, position and rank; the global batch does not depend on the world size, nor on
    the loader processes. Bad samples are replaced by the next good one of their shard and reported in `Batch.reading`.
    Closing the generator ends the loader processes.

    Args:
        start: position of the last batch consumed; None starts at the beginning.
        epochs: of the whole training, those before `start` included.
        bad_samples: receives those of this rank; the caller writes it.

    Raises:
        ConfigError: the split is smaller than a global batch, or the shards in use exceed the memory allowed.
        ShardError: a shard is missing or another than was packed, or too many images are bad.
        StorageError: the storage refuses, or did not answer in time.
    """
    size = config.global_batch_size
    slots = (size * rank // world_size, size * (rank + 1) // world_size)
    index = read_index(data_url, patience_s=config.stream.retry_s)
    shards = ShardColumns(index.split(split))
    source = _PartSource(data_url, shards, slots, config, start, epochs)
    limit = BadSampleLimit(config.stream.max_bad_share)
    if world_size * source.parts > config.stream.lanes:
        processes = f"{world_size} x {source.parts}"
        logger.warning("event=shards_read_twice loader_processes=%s lanes=%d", processes, config.stream.lanes)
    left_out = _epoch_order(shards.samples, config, epoch=0).left_out
    logger.info("event=stream split=%s samples=%d left_out_per_epoch=%d", split, shards.samples.sum(), left_out)
    loaded = iter(source) if config.stream.workers == 0 else iter(_loader(source, device))
    try:
        began = time.perf_counter()
        for first in loaded:
            parts = [_raise_error(part) for part in [first, *itertools.islice(loaded, source.parts - 1)]]
            waited = ReadCounts(wait_s=time.perf_counter() - began)
            batch = _batch(parts, waited, config, device)
            bad_samples.add(batch.reading.bad)
            limit.add(batch.reading)
            yield batch
            began = time.perf_counter()
    finally:
        del loaded  # ends the processes now: left to the garbage collector, each is waited for in vain for seconds


def load_images(data_url: str, split: str, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """All centre views of a split that fits in memory: uint8 (M, 3, S, S), labels (M,) and keys.

    Raises:
        ShardError: an image has no label or cannot be decoded.
    """
    shards = read_index(data_url, patience_s=_PATIENCE_S).split(split)
    images = torch.empty((sum(shard.samples for shard in shards), 3, size, size), dtype=torch.uint8)
    labels, keys = [], []
    for row, (image, label, key) in enumerate(_labelled(data_url, shards, size)):
        images[row] = image
        labels.append(label)
        keys.append(key)
    return images, torch.tensor(labels, dtype=torch.int64), keys


class _PartSource(IterableDataset[CropBatch | HemocoError]):
    """The parts of a rank's batches that one loader process makes, whichever process iterates it."""

    def __init__(
        self,
        data_url: str,
        shards: ShardColumns,
        slots: tuple[int, int],
        config: PretrainConfig,
        start: StreamPosition | None,
        epochs: int,
    ) -> None:
        self._data_url, self._shards, self._config = data_url, shards, config
        self._first = StreamPosition(0, 0) if start is None else start._replace(step=start.step + 1)
        self._epochs = epochs
        first, last = slots
        self.parts = max(1, min(config.stream.workers, last - first))
        cuts = [first + (last - first) * part // self.parts for part in range(self.parts + 1)]
        self._slots = list(itertools.pairwise(cuts))
        for part_slots in self._slots:
            _check_memory(shards, part_slots, config)

    def __iter__(self) -> Iterator[CropBatch | HemocoError]:
        info = get_worker_info()
        try:
            yield from self._crop_batches(self._slots[info.id if info else 0])
        except HemocoError as error:
            yield error  # as a value: a loader process would bury its message in a traceback

    def _crop_batches(self, slots: tuple[int, int]) -> Iterator[CropBatch]:
        views, seed = self._config.views, self._config.seed
        with closing(self._reader(slots)) as reader:
            for position, pieces in self._steps(slots):
                epoch, step = position
                draws = draw_crops(views, seed=seed, epoch=epoch, step=step, slots=slots)
                # channels last, as they are cropped: else each view is transposed, 6% of an image's time
                memory = torch.empty((slots[1] - slots[0], 2, views.size, views.size, 3), dtype=torch.uint8)
                crops = memory.permute(0, 1, 4, 2, 3)
                keys = []
                for row, (key, image) in enumerate(reader.images(epoch, step, pieces)):
                    crops[row] = two_crops(image, draws, row, views.size)
                    keys.append(key)
                yield CropBatch(crops, keys, position, slots, reader.take_counts())

    def _reader(self, slots: tuple[int, int]) -> SampleReader:
        stream = self._config.stream
        cache = ShardCache(home() / "shards", stream.disk_cache_bytes) if stream.disk_cache_bytes else None
        portions = itertools.chain.from_iterable(
            plan_portions(order, epoch, slots, first) for epoch, order, first in self._orders()
        )
        return SampleReader(self._data_url, self._shards, portions, config=stream, cache=cache)

    def _steps(self, slots: tuple[int, int]) -> Iterator[tuple[StreamPosition, list[tuple[int, int, int]]]]:
        for epoch, order, first in self._orders():
            pieces = list(order.slices(*slots))
            for step in range(first, order.steps):
                yield StreamPosition(epoch, step), pieces

    def _orders(self) -> Iterator[tuple[int, EpochOrder, int]]:
        """Epoch, its order and its first step, from the start on."""
        for epoch in range(self._first.epoch, self._epochs):
            first = self._first.step if epoch == self._first.epoch else 0
            yield epoch, _epoch_order(self._shards.samples, self._config, epoch), first


def _loader(source: _PartSource, device: torch.device) -> DataLoader[CropBatch | HemocoError]:
    # a forked child would inherit the locks, but not the threads, of s3fs, gRPC and Ray
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by each process
    # the fork server keeps the environment it was started with, maybe before the storage was known
    storage = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return DataLoader(
        source,
        batch_size=None,
        num_workers=source.parts,
        prefetch_factor=_PREFETCHED_STEPS,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        worker_init_fn=functools.partial(_enter_worker, storage),
        multiprocessing_context=context,
    )


def _as_it_is(part: object) -> object:
    return part


def _enter_worker(environment: dict[str, str], _: int) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)


def _batch(parts: list[CropBatch], waited: ReadCounts, config: PretrainConfig, device: torch.device) -> Batch:
    epoch, step = parts[0].position
    slots = (parts[0].slots[0], parts[-1].slots[1])
    crops = torch.cat([part.crops.to(device, non_blocking=True) for part in parts])  # (N, 2, 3, S, S)
    draws = draw_colours(config.views, seed=config.seed, epoch=epoch, step=step, slots=slots)
    views = augment(crops.transpose(0, 1).flatten(0, 1), draws, config.views)  # (2 N, 3, S, S)
    query_views, key_views = views.chunk(2)
    keys = [key for part in parts for key in part.keys]
    return Batch(
        query_views, key_views, keys, parts[0].position, sum_counts([waited, *(part.reading for part in parts)])
    )


def _raise_error(part: CropBatch | HemocoError) -> CropBatch:
    if isinstance(part, HemocoError):
        raise part
    return part


def _epoch_order(sizes: NDArray[np.int64], config: PretrainConfig, epoch: int) -> EpochOrder:
    return EpochOrder(
        sizes,
        seed=config.seed,
        epoch=epoch,
        lanes=config.stream.lanes,
        shards_per_block=config.stream.shards_per_block,
        global_batch_size=config.global_batch_size,
    )


def _check_memory(shards: ShardColumns, slots: tuple[int, int], config: PretrainConfig) -> None:
    """Refuses a limit that cannot hold the open blocks."""
    stream, width = config.stream, config.global_batch_size // config.stream.lanes
    lanes = -(-slots[1] // width) - slots[0] // width
    largest = int(shards.bytes.max(initial=0))
    needed = min(lanes * stream.shards_per_block * largest, int(shards.bytes.sum()))
    if needed > stream.memory_bytes:
        raise ConfigError(
            f"pretrain.stream.memory_bytes is {stream.memory_bytes}: a loader process reads {lanes} lanes, "
            f"{stream.shards_per_block} shards of up to {largest} bytes at once in each; set it to at least {needed}, "
            "or lower pretrain.stream.shards_per_block, or repack with smaller shards"
        )


def _labelled(data_url: str, shards: tuple[Shard, ...], size: int) -> Iterator[tuple[Tensor, int, str]]:
    for shard in shards:
        for sample in read_shard(data_url, shard):
            where = f"{data_url}/{shard.name}: sample {sample.key}"
            if sample.label is None:
                raise ShardError(f"{where} has no label; evaluate on a labelled split")
            try:
                image = decode_image(sample.image)
            except ShardError as error:
                raise ShardError(f"{where}: {error}") from error
            yield center_view(image, size), sample.label, sample.key
