"""The loader processes of a rank: each makes its part of every global batch, cropped to uint8.

A rank's slots of a global batch are split over its processes, each reading only the shards of its own lanes.

Shapes: V crops of an image, S x S pixels each.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hemoco.config import StreamConfig, ViewsConfig
from hemoco.data.shards.index import ShardColumns
from hemoco.data.stream.bad_samples import ReadCounts
from hemoco.data.stream.order import EpochOrder, plan_portions
from hemoco.data.stream.reader import SampleReader
from hemoco.data.stream.shard_cache import ShardCache
from hemoco.data.transforms import crop_into, draw_crops
from hemoco.errors import (
    ConfigError,
    HemocoError,
    LostLoaderError,
    TrainingError,
    first_line,
    memory_errors,
)
from hemoco.storage.objects import forkable_client, home

_PREFETCHED_STEPS = 2
# A batch is made when the reader asks for the one that is so many steps before it, and has let go of those before.
_BUFFERS = _PREFETCHED_STEPS + 2  # one to spare
_SHARED = "/dev/shm"
_LESS_MEMORY = (
    "lower stream.memory_bytes or stream.workers, or take machines with more memory: the same words go on from the "
    "last checkpoint"
)


class StreamPosition(NamedTuple):
    """The batch just delivered; the next one follows it."""

    epoch: int
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropPlan:
    """What a training asks of the stream: equal plans on equal shards give equal batches."""

    seed: int
    """Of order and crops."""
    epochs: int
    """Of the whole training."""
    global_batch_size: int
    views: ViewsConfig
    """Of which size and crop_scale count here."""
    crops: int
    """V, of each image: two views for pretraining, one for a classifier."""
    stream: StreamConfig


class CropBatch(NamedTuple):
    """What one loader process makes of a global batch."""

    crops: Tensor
    """uint8 (slots, V, 3, S, S); to be copied before the next batch is asked for, for then it may be overwritten."""
    keys: list[str]
    labels: list[int]
    """-1 where there is none."""
    position: StreamPosition
    slots: tuple[int, int]
    """First and last (exclusive) slot in the global batch."""
    reading: ReadCounts


class CropSource(IterableDataset[CropBatch | HemocoError]):
    """The parts of a rank's batches that one loader process makes, whichever process iterates it."""

    def __init__(
        self,
        data_url: str,
        shards: ShardColumns,
        plan: CropPlan,
        *,
        slots: tuple[int, int],
        start: StreamPosition | None,
    ) -> None:
        self.data_url, self._shards, self._plan = data_url, shards, plan
        self._first = StreamPosition(0, 0) if start is None else start._replace(step=start.step + 1)
        first, last = slots
        self.parts = max(1, min(plan.stream.workers, last - first))
        cuts = [first + (last - first) * part // self.parts for part in range(self.parts + 1)]
        self._slots = list(itertools.pairwise(cuts))
        for part_slots in self._slots:
            _check_memory(shards, part_slots, plan)

    def __iter__(self) -> Iterator[CropBatch | HemocoError]:
        info, last = get_worker_info(), self._first
        try:
            with (
                memory_errors(
                    lambda: f"reading ahead of epoch {last.epoch} step {last.step}", _LESS_MEMORY
                ),
                _shared_memory_errors(0),
            ):
                for batch in self._crop_batches(self._slots[info.id if info else 0]):
                    last = batch.position
                    yield batch
        except HemocoError as error:
            yield error  # as a value: a loader process would bury its message in a traceback

    def _crop_batches(self, slots: tuple[int, int]) -> Iterator[CropBatch]:
        views, seed = self._plan.views, self._plan.seed
        buffers = _crop_buffers(slots[1] - slots[0], self._plan.crops, views.size)
        with closing(self._reader(slots)) as reader:
            for (position, pieces), crops in zip(self._steps(slots), buffers, strict=False):
                epoch, step = position
                draws = draw_crops(views, seed=seed, epoch=epoch, step=step, slots=slots)
                keys, labels = [], []
                for row, (read, image) in enumerate(reader.images(epoch, step, pieces)):
                    crop_into(crops[row], image, draws, row)
                    keys.append(read.key)
                    labels.append(read.label)
                yield CropBatch(crops, keys, labels, position, slots, reader.take_counts())

    def _reader(self, slots: tuple[int, int]) -> SampleReader:
        stream = self._plan.stream
        cache = (
            ShardCache(home() / "shards", stream.disk_cache_bytes)
            if stream.disk_cache_bytes
            else None
        )
        portions = itertools.chain.from_iterable(
            plan_portions(order, epoch, slots, first) for epoch, order, first in self._orders()
        )
        return SampleReader(self.data_url, self._shards, portions, config=stream, cache=cache)

    def _steps(
        self, slots: tuple[int, int]
    ) -> Iterator[tuple[StreamPosition, list[tuple[int, int, int]]]]:
        for epoch, order, first in self._orders():
            pieces = list(order.slices(*slots))
            for step in range(first, order.steps):
                yield StreamPosition(epoch, step), pieces

    def _orders(self) -> Iterator[tuple[int, EpochOrder, int]]:
        """Epoch, its order and its first step, from the start on."""
        for epoch in range(self._first.epoch, self._plan.epochs):
            first = self._first.step if epoch == self._first.epoch else 0
            yield epoch, epoch_order(self._shards.samples, self._plan, epoch), first


def start_loader(source: CropSource, device: torch.device) -> Iterator[CropBatch | HemocoError]:
    """The loader processes of a source: what they make of one step after the other, in the order of the slots.

    They end when the iterator is no longer held.

    Raises:
        TrainingError: /dev/shm is full.
        LostLoaderError: iterating, one of the processes was killed.
    """
    # a forked child would inherit the locks, but not the threads, of s3fs, gRPC and Ray
    context = multiprocessing.get_context("forkserver")
    # torch and the storage's client are imported once, not by each process
    context.set_forkserver_preload([__name__, *filter(None, [forkable_client(source.data_url)])])
    # the fork server keeps the environment it was started with, maybe before the storage was known
    storage = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    loader = DataLoader(
        source,
        batch_size=None,
        num_workers=source.parts,
        prefetch_factor=_PREFETCHED_STEPS,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        worker_init_fn=functools.partial(_enter_worker, storage),
        multiprocessing_context=context,
    )
    with _shared_memory_errors(0):
        return _watched(iter(loader))


def _watched(loaded: Iterator[CropBatch | HemocoError]) -> Iterator[CropBatch | HemocoError]:
    try:
        yield from loaded
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        # a process that has gone while its tensor is taken over leaves a broken connection, or none to connect to
        raised_inside = "Caught " in str(
            error
        )  # torch says so of what the process itself has raised
        lost = not raised_inside and (
            "DataLoader worker" in str(error) or not isinstance(error, RuntimeError)
        )
        if not lost:
            raise
        raise LostLoaderError(
            f"a loader process was lost ({first_line(error)}): was it killed because memory ran out? {_LESS_MEMORY}"
        ) from error


def epoch_order(sizes: NDArray[np.int64], plan: CropPlan, epoch: int) -> EpochOrder:
    """The order of an epoch of shards with so many samples each (shards,)."""
    return EpochOrder(
        sizes,
        seed=plan.seed,
        epoch=epoch,
        lanes=plan.stream.lanes,
        shards_per_block=plan.stream.shards_per_block,
        global_batch_size=plan.global_batch_size,
    )


def _as_it_is(part: object) -> object:
    return part


def _enter_worker(environment: dict[str, str], _: int) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)


def _crop_buffers(count: int, crops: int, size: int) -> Iterator[Tensor]:
    """Memory for crops (count, V, 3, S, S), the same few again and again, made as they are needed.

    New memory for each batch would cost a page fault for every 4 KB, and a copy into what is shared: a tenth of the
    time an image takes.
    """
    return itertools.cycle(_new_crops(count, crops, size) for _ in range(_BUFFERS))


def _new_crops(count: int, crops: int, size: int) -> Tensor:
    """Shared with the training process where a loader process asks."""
    # channels last, as they are cropped: else each view is transposed, 6% of an image's time
    memory = torch.empty((count, crops, size, size, 3), dtype=torch.uint8)
    if get_worker_info():
        with _shared_memory_errors(memory.nbytes):
            memory = memory.share_memory_()  # type: ignore[no-untyped-call]
    return memory.permute(0, 1, 4, 2, 3)


@contextlib.contextmanager
def _shared_memory_errors(size: int) -> Iterator[None]:
    """Says in one line that /dev/shm is full; torch reserves there what it maps, so that nobody dies of SIGBUS.

    Args:
        size: bytes of one buffer that are asked for in the block; 0: the locks of queues and pools of threads.

    Raises:
        TrainingError: there is no room.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is torch's
        full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(
            error
        )
        if not full or (free := shutil.disk_usage(_SHARED).free) > size:  # or it was another disk
            raise
        more = "give it more (docker --shm-size, a Memory volume on Kubernetes)"
        wanted, advice = "locks", f"{more}, or remove what fills it"
        if size:
            wanted, advice = (
                f"{_BUFFERS} buffers of {size} bytes",
                f"{more}, or set stream.workers to 0",
            )
        raise TrainingError(
            f"{_SHARED} is full: a process that reads needs {wanted} there, {free} bytes are free; {advice}: the same "
            "words go on from the last checkpoint"
        ) from error


def _check_memory(shards: ShardColumns, slots: tuple[int, int], plan: CropPlan) -> None:
    """Refuses a limit that cannot hold the open blocks."""
    stream, width = plan.stream, plan.global_batch_size // plan.stream.lanes
    lanes = -(-slots[1] // width) - slots[0] // width
    largest = int(shards.bytes.max(initial=0))
    needed = min(lanes * stream.shards_per_block * largest, int(shards.bytes.sum()))
    if needed > stream.memory_bytes:
        raise ConfigError(
            f"stream.memory_bytes is {stream.memory_bytes}: a loader process reads {lanes} lanes, "
            f"{stream.shards_per_block} shards of up to {largest} bytes at once in each; set it to at least {needed}, "
            "or lower stream.shards_per_block, or repack with smaller shards"
        )
