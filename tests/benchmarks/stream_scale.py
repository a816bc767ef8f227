"""The stream at scale, by simulation.

Measures, per loader process: requests and bytes of an epoch, bytes of the open blocks, time and
memory from nothing to the rows of the first step, the cost of a resume in mid-epoch; for the whole:
the index of 100,000 shards on disk, in memory and parsed, the plan of all lanes at once, and the
shuffle. Runs hemoco's own order, portions, ranges, index and assignment of slots; only the layout
of the tars is made up. No network is used.

The shuffle is compared with a full permutation, webdataset's shuffle buffer (that library's code)
and a loader that shuffles one chunk at a time; the plan, with the goals of the design.

    uv run python tests/benchmarks/stream_scale.py
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from machine import describe_machine, table
from numpy.typing import NDArray
from scale_costs import (
    BILLION,
    CLUSTERS,
    IMAGENET,
    RUNS,
    Cluster,
    DataSet,
    due_portions,
    epoch_order,
    index_cost,
    peak_bytes,
    process_cost,
    seconds,
)
from shuffle_quality import (
    buffer_streams,
    chunk_streams,
    lane_batches,
    permutation_batches,
    quality,
    worker_batches,
)

from hemoco.config import StreamConfig


def _print_processes(data: DataSet) -> None:
    names = (
        *(
            "processes",
            "ranks",
            "batch",
            "lanes",
            "lanes each",
            "requests",
            "tables",
            "GB",
            "amplification",
        ),
        *("open MB", "start ms", "start MB", "resume ms", "fetched again MB"),
    )
    rows = []
    for cluster in CLUSTERS:
        cost = process_cost(data, cluster, cluster.processes // 2)
        fetched = cost.fetched
        rows.append(
            [
                *(
                    cluster.processes,
                    cluster.ranks,
                    cluster.batch,
                    cluster.lanes,
                    cluster.lanes / cluster.processes,
                ),
                *(
                    fetched.ranges,
                    fetched.shards,
                    fetched.bytes / 1e9,
                    fetched.bytes / fetched.wanted,
                ),
                *(cost.open.held / 1e6, cost.start_s * 1e3, cost.start_bytes / 1e6),
                *(cost.resume_s * 1e3, cost.again.bytes / 1e6),
            ]
        )
    print(table(f"One loader process: {data.name}, blocks of {data.shards_per_block}", names, rows))
    print(
        "open: fetched before the first batch, and refused above stream.memory_bytes "
        f"({StreamConfig().memory_bytes / 1e6:,.0f} MB unless set); "
        "reading ahead holds as much again"
    )


def _print_index() -> None:
    costs = [(data.shards, index_cost(data)) for data in (IMAGENET, BILLION)]
    names = (
        *(
            "shards",
            "index MB",
            "read s",
            "read peak MB",
            "columns ms",
            "columns MB",
            "bytes per shard",
        ),
        *("sent to a process MB", "a sample table KB"),
    )
    rows = [
        [
            *(
                shards,
                cost.disk_bytes / 1e6,
                cost.read_s,
                cost.read_bytes / 1e6,
                cost.columns_s * 1e3,
            ),
            *(
                cost.columns_bytes / 1e6,
                cost.columns_bytes / shards,
                cost.sent_bytes / 1e6,
                cost.table_bytes / 1e3,
            ),
        ]
        for shards, cost in costs
    ]
    print(table("The index", names, rows))


def _print_plan() -> None:
    """The goals of the design: all lanes at once, and one rank of 128."""
    cluster = Cluster(4096, 512)  # batch 16,384

    def rows(slots: tuple[int, int]) -> NDArray[np.int64]:
        order = epoch_order(BILLION, cluster)
        return order.samples(order.steps // 2, *slots)

    whole, rank = (0, cluster.batch), (0, cluster.batch // 128)
    plans: list[tuple[str, Callable[[], object], str]] = [
        ("rows of a step, all lanes", functools.partial(rows, whole), "< 1 s, < 200 MB"),
        ("rows of a step, 1 rank of 128 (4 lanes)", functools.partial(rows, rank), "< 10 ms"),
        (
            "portions of a step, all lanes",
            functools.partial(due_portions, BILLION, cluster, whole, None),
            "",
        ),
        (
            "portions of a step, 1 rank of 128",
            functools.partial(due_portions, BILLION, cluster, rank, None),
            "",
        ),
    ]
    found = [
        (name, seconds(work) * 1e3, peak_bytes(work) / 1e6, goal) for name, work, goal in plans
    ]
    print(
        table(
            f"Plan in mid-epoch: {BILLION.name}, 512 lanes x 2",
            ("what", "cpu ms", "peak MB", "goal"),
            found,
        )
    )


def _print_quality(data: DataSet, lanes_and_blocks: Sequence[tuple[int, int]], steps: int) -> None:
    batch, workers = 1024, 32
    each = data.samples // data.shards
    chunk = 64_000_000 * each // data.shard_bytes
    rows = [
        (
            "full permutation",
            *quality(data.sizes, permutation_batches(data.samples, batch=batch, steps=30)),
            "all",
        )
    ]
    for lanes, block in lanes_and_blocks:
        found = quality(
            data.sizes, lane_batches(data.sizes, lanes=lanes, block=block, batch=batch, steps=steps)
        )
        rows.append((f"hemoco {lanes} x {block}", *found, f"{lanes * block} shards"))
    for buffer in (1000, 5000):
        streams = buffer_streams(data.sizes, workers=workers, buffer=buffer)
        settled = worker_batches(streams, ranks=8, batch=batch, steps=300)[150:]
        rows.append(
            (
                f"webdataset, buffers of {buffer}",
                *quality(data.sizes, settled),
                f"{workers * buffer} samples",
            )
        )
    single = worker_batches(
        chunk_streams(data.samples, workers=workers, chunk=chunk), ranks=8, batch=batch, steps=150
    )
    rows.append(
        ("one chunk of 64 MB each", *quality(data.sizes, single), f"{workers * chunk} samples")
    )
    names = ("order", "effective shards", "classes of 1,000", "open on the cluster")
    print(table(f"Batches of {batch}, others with 8 ranks x 4 workers: {data.name}", names, rows))


if __name__ == "__main__":
    print(
        describe_machine(
            ["numpy", "webdataset"], f"times: CPU, medians of {RUNS}; layouts and orders: one seed"
        )
    )
    _print_plan()
    _print_index()
    for data_set in (IMAGENET, BILLION):
        _print_processes(data_set)
    _print_quality(
        IMAGENET,
        [(8, 1), (16, 4), (32, 4), (64, 1), (64, 2), (64, 4), (128, 2), (128, 4)],
        steps=60,
    )
    _print_quality(BILLION, [(64, 4), (128, 4), (512, 2)], steps=8)
