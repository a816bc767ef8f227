"""Simulated cost of a loader process for data of any size: bytes fetched, memory, computing.

No data is read. The order, the portions, the ranges, the index and the slots of a process are
hemoco's own code. Only the tars are made up: layouts of samples of log-normal size.
"""

import functools
import itertools
import pickle
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hemoco.config import MoCoConfig, PretrainConfig, ResourcesConfig, StreamConfig
from hemoco.data.shards.index import (
    INDEX_NAME,
    Shard,
    ShardColumns,
    ShardIndex,
    read_index,
    write_index,
)
from hemoco.data.shards.read import plan_ranges
from hemoco.data.shards.table import SampleTable, encode_table
from hemoco.data.stream.batches import pretraining_plan
from hemoco.data.stream.loader import CropSource
from hemoco.data.stream.order import EpochOrder, Portion, plan_portions

PROCESSES_PER_RANK = 8
IMAGES_PER_RANK = 32  # in a step, as MoCo's 256 on 8 GPUs
MOST_PORTIONS = 64  # simulated per process; an epoch of more is scaled from them
RUNS = 5


@dataclass(frozen=True)
class DataSet:
    """Shards of equal bytes, and samples that are spread evenly over them."""

    name: str
    samples: int
    shards: int
    shard_bytes: int
    shards_per_block: int

    @functools.cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Samples of each shard."""
        return np.diff(np.arange(self.shards + 1) * self.samples // self.shards)


IMAGENET = DataSet("1.28 M samples, 1,282 x 117 MB", 1_281_167, 1_282, 117_000_000, 4)
BILLION = DataSet("10^9 samples, 100,000 x 1 GB", 10**9, 100_000, 10**9, 2)


@dataclass(frozen=True)
class Cluster:
    """Number of loader processes and of lanes they read in; a rank for every 8 processes."""

    processes: int
    lanes: int

    @property
    def ranks(self) -> int:
        return max(1, self.processes // PROCESSES_PER_RANK)

    @property
    def batch(self) -> int:
        """Images of a step: 32 for each rank, at least MoCo's 256."""
        return max(256, IMAGES_PER_RANK * self.ranks)


# a lane for each process and at least 64 is the sensible choice; the others show what too few
# lanes cost
CLUSTERS = (
    *(Cluster(8, 16), Cluster(8, 64), Cluster(64, 64), Cluster(512, 64), Cluster(512, 512)),
    *(Cluster(4096, 512), Cluster(4096, 4096)),
)


class Fetched(NamedTuple):
    """Cost of reading some portions."""

    ranges: int = 0
    shards: int = 0
    """Each needs its sample table besides."""
    bytes: int = 0
    wanted: int = 0
    """Bytes of the spans of the samples wanted, tar headers included."""
    held: int = 0
    """Bytes in memory while the portions are in use."""

    def plus(self, other: "Fetched") -> "Fetched":
        """Both together."""
        return Fetched(*(a + b for a, b in zip(self, other, strict=True)))


class ProcessCost(NamedTuple):
    """One loader process."""

    fetched: Fetched
    """In an epoch."""
    open: Fetched
    """Blocks that the first step needs: in memory, and fetched before the first batch."""
    start_s: float
    start_bytes: int
    resume_s: float
    again: Fetched
    """Fetched again on a resume in mid-epoch, mean over several steps."""


@functools.cache
def layout(samples: int, shard_bytes: int) -> NDArray[np.int64]:
    """First bytes of the samples of a shard and its end (samples + 1,)."""
    spans = np.random.default_rng(samples).lognormal(0, 0.5, samples)
    return np.floor(np.concatenate([[0], np.cumsum(spans)]) / spans.sum() * shard_bytes).astype(
        np.int64
    )


def fetch(portion: Portion, data: DataSet) -> Fetched:
    """Computes what the reader would fetch and hold for a portion, shard after shard."""
    total = Fetched()
    for shard in np.unique(portion.rows[:, 0]).tolist():
        numbers = portion.rows[portion.rows[:, 0] == shard, 1]
        edges = layout(int(data.sizes[shard]), data.shard_bytes)
        spans = edges[numbers + 1] - edges[numbers]
        ranges = plan_ranges(edges[numbers].tolist(), spans.tolist(), data.shard_bytes)
        size, wanted = sum(stop - start for start, stop in ranges), int(spans.sum())
        held = (
            wanted if 2 * len(numbers) < data.sizes[shard] else size
        )  # the reader copies the few out
        total = total.plus(Fetched(len(ranges), 1, size, wanted, held))
    return total


def process_slots(data: DataSet, cluster: Cluster, process: int) -> tuple[int, int]:
    """The slots of a loader process, from the stream's own code."""
    workers = min(cluster.processes, PROCESSES_PER_RANK)
    rank, part = divmod(process, workers)
    config = PretrainConfig(
        global_batch_size=cluster.batch,
        moco=MoCoConfig(queue_length=cluster.batch, bn_group_size=2),
        stream=StreamConfig(
            workers=workers,
            lanes=cluster.lanes,
            shards_per_block=data.shards_per_block,
            memory_bytes=10**15,
        ),
        resources=ResourcesConfig(workers=cluster.ranks),
    )
    slots = (cluster.batch * rank // cluster.ranks, cluster.batch * (rank + 1) // cluster.ranks)
    source = CropSource(
        "",
        ShardColumns(made_up_shards(data)[:1]),
        pretraining_plan(config),
        slots=slots,
        start=None,
    )
    return source._slots[part]


def epoch_order(data: DataSet, cluster: Cluster) -> EpochOrder:
    """The order of epoch 3."""
    return EpochOrder(
        data.sizes,
        seed=0,
        epoch=3,
        lanes=cluster.lanes,
        shards_per_block=data.shards_per_block,
        global_batch_size=cluster.batch,
    )


def due_portions(
    data: DataSet, cluster: Cluster, slots: tuple[int, int], step: int | None
) -> list[Portion]:
    """Computes the portions up to a step, as a process must before it can fetch anything.

    Args:
        data: the data set.
        cluster: the loader processes and lanes.
        slots: those of the process.
        step: the step whose rows are needed; None for the middle one.
    """
    order = epoch_order(data, cluster)
    first = order.steps // 2 if step is None else step
    return list(
        itertools.takewhile(lambda p: p.first_step <= first, plan_portions(order, 3, slots, first))
    )


def epoch_fetches(data: DataSet, cluster: Cluster, slots: tuple[int, int], most: int) -> Fetched:
    """Computes what a process fetches in an epoch.

    If there are more than `most` portions, the figures are scaled up from the first `most`.
    """
    order = epoch_order(data, cluster)
    total, rows = Fetched(), 0
    for portion in itertools.islice(plan_portions(order, 3, slots, 0), most):
        total, rows = total.plus(fetch(portion, data)), rows + len(portion.rows)
    scale = order.steps * (slots[1] - slots[0]) / rows
    return Fetched(*(round(value * scale) for value in total))


def process_cost(data: DataSet, cluster: Cluster, process: int) -> ProcessCost:
    """All figures of one loader process."""
    slots = process_slots(data, cluster, process)
    start = functools.partial(due_portions, data, cluster, slots, 0)
    resume = functools.partial(due_portions, data, cluster, slots, None)
    middle = epoch_order(data, cluster).steps // 2
    steps = [middle * (8 + part) // 8 for part in range(RUNS)]
    again = [
        _sum(fetch(portion, data) for portion in due_portions(data, cluster, slots, step))
        for step in steps
    ]
    return ProcessCost(
        fetched=epoch_fetches(data, cluster, slots, MOST_PORTIONS),
        open=_sum(fetch(portion, data) for portion in start()),
        start_s=seconds(start),
        start_bytes=peak_bytes(start),
        resume_s=seconds(resume),
        again=Fetched(*(round(statistics.mean(column)) for column in zip(*again, strict=True))),
    )


def seconds(work: Callable[[], object]) -> float:
    """CPU time of some work, the median of several runs."""
    times = []
    for _ in range(RUNS):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that some work holds at a time, its result included."""
    tracemalloc.start()
    kept = work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak


@functools.cache
def made_up_shards(data: DataSet) -> tuple[Shard, ...]:
    """Entries of the index for made-up shards."""
    digests = np.random.default_rng(0).bytes(32 * data.shards).hex()
    return tuple(
        Shard(
            f"train-{number:06d}.tar",
            "train",
            size,
            data.shard_bytes,
            digests[64 * number : 64 * (number + 1)],
        )
        for number, size in enumerate(data.sizes.tolist())
    )


class IndexCost(NamedTuple):
    """The index of a shard folder, and what loader processes get of it."""

    disk_bytes: int
    read_s: float
    read_bytes: int
    """Most memory while it is read."""
    columns_s: float
    columns_bytes: int
    sent_bytes: int
    """Bytes of the columns sent to each loader process."""
    table_bytes: int
    """Bytes of the sample table of one shard, in storage."""


def index_cost(data: DataSet) -> IndexCost:
    """Writes an index of made-up shards, reads it with hemoco's reader, and makes columns of it."""
    shards = made_up_shards(data)
    with tempfile.TemporaryDirectory() as folder:
        url = Path(folder).as_uri()
        write_index(url, ShardIndex(shards, (), ()))
        columns = ShardColumns(read_index(url).shards)
        kept = [value.nbytes for value in vars(columns).values() if isinstance(value, np.ndarray)]
        return IndexCost(
            disk_bytes=(Path(folder) / INDEX_NAME).stat().st_size,
            read_s=seconds(lambda: read_index(url)),
            read_bytes=peak_bytes(lambda: read_index(url)),
            columns_s=seconds(lambda: ShardColumns(shards)),
            columns_bytes=sum(kept),
            sent_bytes=len(pickle.dumps(columns)),
            table_bytes=len(encode_table(made_up_table(data))),
        )


def made_up_table(data: DataSet) -> SampleTable:
    """The sample table of the first shard."""
    edges, rng = layout(int(data.sizes[0]), data.shard_bytes), np.random.default_rng(0)
    count = len(edges) - 1
    return SampleTable(
        keys=[f"n{number % 1000:08d}_{number:06d}" for number in range(count)],
        offsets=edges[:-1] // 512 * 512,
        sizes=np.diff(edges),
        crcs=rng.integers(1 << 32, size=count, dtype=np.uint32),
        labels=rng.integers(1000, size=count),
        suffixes=np.zeros(count, np.uint8),
    )


def _sum(parts: Iterable[Fetched]) -> Fetched:
    return functools.reduce(Fetched.plus, parts, Fetched())
