"""The loader processes of a rank: each makes its part of every global batch, cropped to uint8.

A rank's slots of a global batch are split over its loader processes. Each reads only the shards of
the lanes in which its slots lie.

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
from hemoco.data.stream.order import EpochOrder, LaneSlice, plan_portions
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
# A loader process makes a batch when the training process takes the one _PREFETCHED_STEPS before
# it, and by then has copied the batches before that one. One buffer is to spare.
_BUFFERS = _PREFETCHED_STEPS + 2
_SHARED_MEMORY = "/dev/shm"
_RESUMES = "then run the same command again; it resumes from the last checkpoint"
_LESS_MEMORY = (
    "lower stream.memory_bytes or stream.workers, or take machines with more memory, " + _RESUMES
)


class StreamPosition(NamedTuple):
    """Position of the batch just delivered; the next batch follows it."""

    epoch: int
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropPlan:
    """Everything that determines the batches of a training, besides the shards.

    Equal plans on equal shards give equal batches.
    """

    seed: int
    """Seed of the order and of the crops."""
    epochs: int
    """Epochs of the whole training."""
    global_batch_size: int
    views: ViewsConfig
    """Only `size` and `crop_scale` are used here."""
    crops: int
    """V, crops of each image: two views for pretraining, one for a classifier."""
    stream: StreamConfig


class CropBatch(NamedTuple):
    """One loader process's part of a global batch."""

    crops: Tensor
    """uint8 (slots, V, 3, S, S). Copy it before taking the next batch, which may overwrite it."""
    keys: list[str]
    labels: list[int]
    """-1 where there is none."""
    position: StreamPosition
    slots: tuple[int, int]
    """Range [start, stop) of slots in the global batch."""
    reading: ReadCounts


class CropSource(IterableDataset[CropBatch | HemocoError]):
    """Batches of one loader process, in whichever process it is iterated.

    Errors of ours are yielded as values: a DataLoader would bury the message of an error that is
    raised in a loader process in a traceback.

    Args:
        data_url: URL of the shard folder.
        shards: shards of the split.
        plan: order and crops.
        slots: the rank's range [start, stop) of slots.
        start: position of the last batch consumed; None starts at the beginning.

    Attributes:
        parts: loader processes of the rank, at least 1 and at most one for each slot.

    Raises:
        ConfigError: the shards that are open at once exceed `stream.memory_bytes`.
    """

    def __init__(
        self,
        data_url: str,
        shards: ShardColumns,
        plan: CropPlan,
        *,
        slots: tuple[int, int],
        start: StreamPosition | None,
    ) -> None:
        self.data_url = data_url
        self._shards = shards
        self._plan = plan
        self._first = StreamPosition(0, 0) if start is None else start._replace(step=start.step + 1)
        first_slot, stop_slot = slots
        count = stop_slot - first_slot
        self.parts = max(1, min(plan.stream.workers, count))
        cuts = [first_slot + count * part // self.parts for part in range(self.parts + 1)]
        self._slots = list(itertools.pairwise(cuts))
        for part_slots in self._slots:
            _check_memory(shards, part_slots, plan)

    def __iter__(self) -> Iterator[CropBatch | HemocoError]:
        info = get_worker_info()
        slots = self._slots[info.id if info else 0]
        last = self._first

        def doing() -> str:
            return f"reading ahead of epoch {last.epoch} step {last.step}"

        try:
            with memory_errors(doing, _LESS_MEMORY), _shared_memory_errors(0):
                for batch in self._crop_batches(slots):
                    last = batch.position
                    yield batch
        except HemocoError as error:
            yield error

    def _crop_batches(self, slots: tuple[int, int]) -> Iterator[CropBatch]:
        views, seed = self._plan.views, self._plan.seed
        buffers = _crop_buffers(slots[1] - slots[0], self._plan.crops, views.size)
        with closing(self._reader(slots)) as reader:
            for (position, slices), crops in zip(self._steps(slots), buffers, strict=False):
                epoch, step = position
                draws = draw_crops(views, seed=seed, epoch=epoch, step=step, slots=slots)
                keys, labels = [], []
                for row, (sample, image) in enumerate(reader.images(epoch, step, slices)):
                    crop_into(crops[row], image, draws, row)
                    keys.append(sample.key)
                    labels.append(sample.label)
                yield CropBatch(crops, keys, labels, position, slots, reader.take_counts())

    def _reader(self, slots: tuple[int, int]) -> SampleReader:
        stream = self._plan.stream
        cache = None
        if stream.disk_cache_bytes:
            cache = ShardCache(home() / "shards", stream.disk_cache_bytes)
        portions = itertools.chain.from_iterable(
            plan_portions(order, epoch, slots, first) for epoch, order, first in self._orders()
        )
        return SampleReader(self.data_url, self._shards, portions, config=stream, cache=cache)

    def _steps(self, slots: tuple[int, int]) -> Iterator[tuple[StreamPosition, list[LaneSlice]]]:
        for epoch, order, first in self._orders():
            slices = list(order.slices(*slots))
            for step in range(first, order.steps):
                yield StreamPosition(epoch, step), slices

    def _orders(self) -> Iterator[tuple[int, EpochOrder, int]]:
        """Each epoch from the start on, with its order and its first step."""
        for epoch in range(self._first.epoch, self._plan.epochs):
            first = self._first.step if epoch == self._first.epoch else 0
            yield epoch, epoch_order(self._shards.samples, self._plan, epoch), first


def start_loader(source: CropSource, device: torch.device) -> Iterator[CropBatch | HemocoError]:
    """Starts the loader processes of a source and yields their parts, in the order of the slots.

    All parts of one step come before those of the next. The processes end when the iterator is no
    longer referenced.

    Raises:
        TrainingError: /dev/shm is full.
        LostLoaderError: while iterating, one of the processes was killed.
    """
    # Not "fork": a forked child would inherit the locks of s3fs, gRPC and Ray, but not the threads
    # that release them, and hang. Not "spawn": each process would import torch anew.
    context = multiprocessing.get_context("forkserver")
    # torch and the storage's client are imported once in the fork server, not by each process
    context.set_forkserver_preload([__name__, *filter(None, [forkable_client(source.data_url)])])
    # The fork server lives on with the environment it was started with, perhaps before the
    # credentials were set. So the loader processes get them from here.
    storage = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    loader = DataLoader(
        source,
        batch_size=None,
        num_workers=source.parts,
        prefetch_factor=_PREFETCHED_STEPS,
        collate_fn=_unchanged,  # the default would walk through every key and label
        pin_memory=device.type == "cuda",
        worker_init_fn=functools.partial(_init_loader_process, storage),
        multiprocessing_context=context,
    )
    with _shared_memory_errors(0):
        return _name_lost_process(iter(loader))


def _name_lost_process(
    loaded: Iterator[CropBatch | HemocoError],
) -> Iterator[CropBatch | HemocoError]:
    """Yields what a DataLoader loads, and raises LostLoaderError where one of its processes died.

    torch raises RuntimeError ("DataLoader worker (pid 7) is killed by signal") for a process that
    died. If it died while its tensor was being received, the connection to it is broken (EOFError,
    ConnectionError) or its socket is gone (FileNotFoundError). An error that was raised inside a
    process is none of these: torch puts "Caught ..." before its message.
    test_host_faults: test_a_loader_process_that_the_kernel_kills_is_named.
    """
    try:
        yield from loaded
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        message = str(error)
        if "Caught " in message:
            raise
        if isinstance(error, RuntimeError) and "DataLoader worker" not in message:
            raise
        raise LostLoaderError(
            f"a loader process was lost ({first_line(error)}): was it killed because memory ran "
            f"out? {_LESS_MEMORY}"
        ) from error


def epoch_order(sizes: NDArray[np.int64], plan: CropPlan, epoch: int) -> EpochOrder:
    """The order of an epoch, for shards with these numbers of samples (shards,)."""
    return EpochOrder(
        sizes,
        seed=plan.seed,
        epoch=epoch,
        lanes=plan.stream.lanes,
        shards_per_block=plan.stream.shards_per_block,
        global_batch_size=plan.global_batch_size,
    )


def _unchanged(part: object) -> object:
    return part


def _init_loader_process(environment: dict[str, str], _: int) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)  # the processes share the cores; more threads would only compete


def _crop_buffers(count: int, crops: int, size: int) -> Iterator[Tensor]:
    """Memory for crops (count, V, 3, S, S): the same few buffers in turn, made when first needed.

    New memory for each batch would cost a page fault for every 4 KB and a copy into shared memory:
    a tenth of the time that an image takes.
    """
    return itertools.cycle(_new_buffer(count, crops, size) for _ in range(_BUFFERS))


def _new_buffer(count: int, crops: int, size: int) -> Tensor:
    """Memory for crops (count, V, 3, S, S), shared with the training process if made in another."""
    # channels last, as images are decoded and cropped: otherwise each view is transposed, which
    # takes 6% of an image's time
    memory = torch.empty((count, crops, size, size, 3), dtype=torch.uint8)
    if get_worker_info():
        with _shared_memory_errors(memory.nbytes):
            memory = memory.share_memory_()  # type: ignore[no-untyped-call]
    return memory.permute(0, 1, 4, 2, 3)  # (count, V, 3, S, S)


@contextlib.contextmanager
def _shared_memory_errors(size: int) -> Iterator[None]:
    """Turns the errors of a full /dev/shm into one line with what is needed and what to do.

    torch reserves there what it maps, so a full /dev/shm is an error here and not a SIGBUS later.

    Args:
        size: bytes of the buffer that the block allocates; 0 if it only makes queues and threads,
            whose locks lie in /dev/shm too.

    Raises:
        TrainingError: /dev/shm is full.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError
        no_space = os.strerror(errno.ENOSPC)
        if getattr(error, "errno", None) != errno.ENOSPC and no_space not in str(error):
            raise
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if free > size:  # it was another disk that is full
            raise
        enlarge = "give it more (docker --shm-size, a Memory volume on Kubernetes)"
        if size:
            needed = f"{_BUFFERS} buffers of {size} bytes"
            advice = f"{enlarge}, or set stream.workers to 0"
        else:
            needed = "locks"
            advice = f"{enlarge}, or remove what fills it"
        raise TrainingError(
            f"{_SHARED_MEMORY} is full: a process that reads needs {needed} there, {free} bytes "
            f"are free; {advice}, {_RESUMES}"
        ) from error


def _check_memory(shards: ShardColumns, slots: tuple[int, int], plan: CropPlan) -> None:
    """Raises ConfigError if the blocks that are open at once exceed `stream.memory_bytes`."""
    stream = plan.stream
    slots_per_lane = plan.global_batch_size // stream.lanes
    first_lane = slots[0] // slots_per_lane
    last_lane = (slots[1] - 1) // slots_per_lane
    lanes = last_lane + 1 - first_lane
    largest = int(shards.bytes.max(initial=0))
    needed = min(lanes * stream.shards_per_block * largest, int(shards.bytes.sum()))
    if needed > stream.memory_bytes:
        raise ConfigError(
            f"stream.memory_bytes is {stream.memory_bytes}: a loader process reads {lanes} lanes, "
            f"{stream.shards_per_block} shards of up to {largest} bytes at once in each; set it to "
            f"at least {needed}, or lower stream.shards_per_block, or repack with smaller shards"
        )
