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
from collections import OrderedDict
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hemoco.config import PretrainConfig
from hemoco.data.order import EpochOrder
from hemoco.data.shards import Sample, Shard, ShardIndex, read_index, read_shard
from hemoco.data.views import augment, center_view, decode_image, draw_colours, draw_crops, two_crops
from hemoco.errors import ConfigError, HemocoError, ShardError

logger = logging.getLogger(__name__)

_PREFETCHED_STEPS = 2
_BAD_ALLOWED, _BAD_RATE = 10, 0.01  # undecodable images: as many always, then as a fraction of those read


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


class Batch(NamedTuple):
    """One rank's part of a global batch, on the device."""

    query_views: Tensor
    """float32 (N, 3, S, S), normalised."""
    key_views: Tensor
    """float32 (N, 3, S, S), normalised; row i shows the image of query i."""
    keys: list[str]
    position: StreamPosition


def steps_per_epoch(index: ShardIndex, split: str, config: PretrainConfig) -> int:
    """Global batches in an epoch of a split, the same in every epoch and on every rank.

    Raises:
        ConfigError: the split has fewer samples than one global batch.
        ShardError: there is no such split.
    """
    return _epoch_order(index.split(split), config, epoch=0).steps


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
) -> Generator[Batch, None, None]:
    """This rank's batches after the position `start` to the end of the last epoch.

    A batch is a function of data, config, position and rank; the global batch does not depend on the world size.
    Closing the generator ends the loader processes.

    Args:
        start: position of the last batch consumed; None starts at the beginning.
        epochs: of the whole training, those before `start` included.

    Raises:
        ConfigError: the split is smaller than a global batch, or the shards in use exceed the loader's cache.
        ShardError: a shard is missing or damaged, or too many of its images cannot be decoded.
    """
    size = config.global_batch_size
    slots = (size * rank // world_size, size * (rank + 1) // world_size)
    source = _PartSource(data_url, read_index(data_url).split(split), slots, config, start, epochs)
    loaded = iter(source) if config.stream.workers == 0 else iter(_loader(source, device))
    try:
        for first in loaded:
            parts = [_raise_error(part) for part in [first, *itertools.islice(loaded, source.parts - 1)]]
            yield _batch(parts, slots, config, device)
    finally:
        del loaded  # ends the processes now: left to the garbage collector, each is waited for in vain for seconds


def labelled_batches(data_url: str, split: str, size: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Centre views and labels of a whole split, in storage order: uint8 (B, 3, S, S) and int64 (B,).

    Raises:
        ShardError: an image has no label or cannot be decoded.
    """
    samples = _labelled(data_url, read_index(data_url).split(split), size)
    while rows := list(itertools.islice(samples, batch_size)):
        images, labels, _ = zip(*rows, strict=True)
        yield torch.stack(images), torch.tensor(labels)


def load_images(data_url: str, split: str, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """All centre views of a split that fits in memory: uint8 (M, 3, S, S), labels (M,) and keys.

    Raises:
        ShardError: an image has no label or cannot be decoded.
    """
    shards = read_index(data_url).split(split)
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
        shards: tuple[Shard, ...],
        slots: tuple[int, int],
        config: PretrainConfig,
        start: StreamPosition | None,
        epochs: int,
    ) -> None:
        self._data_url, self._shards, self._config = data_url, shards, config
        self._start, self._epochs = start, epochs
        first, last = slots
        self.parts = max(1, min(config.stream.workers, last - first))
        cuts = [first + (last - first) * part // self.parts for part in range(self.parts + 1)]
        self._slots = list(itertools.pairwise(cuts))
        for part_slots in self._slots:
            _check_cache(shards, part_slots, config)

    def __iter__(self) -> Iterator[CropBatch | HemocoError]:
        info = get_worker_info()
        try:
            yield from self._crop_batches(self._slots[info.id if info else 0])
        except HemocoError as error:
            yield error  # as a value: a loader process would bury its message in a traceback

    def _crop_batches(self, slots: tuple[int, int]) -> Iterator[CropBatch]:
        config, reader = self._config, _ImageReader(self._data_url, self._shards, self._config.stream.cache_bytes)
        first = StreamPosition(0, 0) if self._start is None else self._start._replace(step=self._start.step + 1)
        for epoch in range(first.epoch, self._epochs):
            order = _epoch_order(self._shards, config, epoch)
            for step in range(first.step if epoch == first.epoch else 0, order.steps):
                draws = draw_crops(config.views, seed=config.seed, epoch=epoch, step=step, slots=slots)
                places = order.samples(step, *slots).tolist()
                images = [reader.image(shard, sample) for shard, sample in places]
                crops = [two_crops(image, draws, row, config.views.size) for row, (_, image) in enumerate(images)]
                keys = [key for key, _ in images]
                yield CropBatch(torch.stack(crops), keys, StreamPosition(epoch, step), slots)


class _ImageReader:
    """Decodes samples of shards, of which it keeps the last used in memory.

    An image that cannot be decoded is replaced by the next good one of its shard, so that order and steps stay; it is
    counted, logged, and too many of them are an error.
    """

    def __init__(self, data_url: str, shards: tuple[Shard, ...], cache_bytes: int) -> None:
        self._data_url, self._shards, self._cache_bytes = data_url, shards, cache_bytes
        self._cache: OrderedDict[int, list[Sample]] = OrderedDict()
        self._read, self._bad = 0, 0

    def image(self, shard: int, number: int) -> tuple[str, Tensor]:
        """Key and uint8 image (3, H, W) of a sample or of its replacement."""
        samples = self._samples(shard)
        self._read += 1
        for offset in range(len(samples)):
            sample = samples[(number + offset) % len(samples)]
            try:
                return sample.key, decode_image(sample.image)
            except ShardError as error:
                if offset == 0:
                    self._count_bad(f"{self._data_url}/{self._shards[shard].name}: sample {sample.key}: {error}")
        raise ShardError(f"{self._data_url}/{self._shards[shard].name}: none of its images can be decoded; repack it")

    def _samples(self, shard: int) -> list[Sample]:
        if shard not in self._cache:
            held = sum(self._shards[number].bytes for number in self._cache) + self._shards[shard].bytes
            while self._cache and held > self._cache_bytes:
                held -= self._shards[self._cache.popitem(last=False)[0]].bytes
            self._cache[shard] = read_shard(self._data_url, self._shards[shard])
        self._cache.move_to_end(shard)
        return self._cache[shard]

    def _count_bad(self, what: str) -> None:
        self._bad += 1
        if self._bad & (self._bad - 1) == 0:  # the 1st, 2nd, 4th, ...: the total says the rest
            logger.warning("replaced an undecodable image bad=%d read=%d: %s", self._bad, self._read, what)
        if self._bad >= _BAD_ALLOWED and self._bad > _BAD_RATE * self._read:
            raise ShardError(f"{self._bad} of {self._read} images cannot be decoded, the last is {what}; repack them")


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


def _batch(parts: list[CropBatch], slots: tuple[int, int], config: PretrainConfig, device: torch.device) -> Batch:
    epoch, step = parts[0].position
    crops = torch.cat([part.crops.to(device, non_blocking=True) for part in parts])  # (N, 2, 3, S, S)
    draws = draw_colours(config.views, seed=config.seed, epoch=epoch, step=step, slots=slots)
    views = augment(crops.transpose(0, 1).flatten(0, 1), draws, config.views)  # (2 N, 3, S, S)
    query_views, key_views = views.chunk(2)
    return Batch(query_views, key_views, [key for part in parts for key in part.keys], parts[0].position)


def _raise_error(part: CropBatch | HemocoError) -> CropBatch:
    if isinstance(part, HemocoError):
        raise part
    return part


def _epoch_order(shards: tuple[Shard, ...], config: PretrainConfig, epoch: int) -> EpochOrder:
    return EpochOrder(
        [shard.samples for shard in shards],
        seed=config.seed,
        epoch=epoch,
        lanes=config.stream.lanes,
        shards_per_block=config.stream.shards_per_block,
        global_batch_size=config.global_batch_size,
    )


def _check_cache(shards: tuple[Shard, ...], slots: tuple[int, int], config: PretrainConfig) -> None:
    """Refuses a cache that cannot hold the open blocks: nearly every image would read a shard again."""
    stream, width = config.stream, config.global_batch_size // config.stream.lanes
    lanes = -(-slots[1] // width) - slots[0] // width
    largest = max((shard.bytes for shard in shards), default=0)
    needed = min(lanes * stream.shards_per_block * largest, sum(shard.bytes for shard in shards))
    if needed > stream.cache_bytes:
        raise ConfigError(
            f"pretrain.stream.cache_bytes is {stream.cache_bytes}: a loader process reads {lanes} lanes, "
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
