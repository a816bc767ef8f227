"""One way of stream_speed.py, measured once, in a process of its own.

It is run as `python -c "import speed_run; speed_run.main()" METHOD BUCKET_FOLDER` with this folder
in PYTHONPATH: a script would be run again by every loader process that is not forked.

Prints JSON. CPU time is that of this process and all below it. The figures of a loader are
differences between all images and a few, so that the cost of starting (imports, clients,
processes) is in neither.
"""

import functools
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import simplejpeg
import speed_loaders as loaders
import torch
from speed_data import read_photos
from torch import Tensor

from hemoco.data.decode import decode_image

URL = "s3://hemoco"
TICKS = os.sysconf("SC_CLK_TCK")
PASSES = 5

IN_MEMORY: dict[str, Callable[[bytes], object]] = {
    "limit: simplejpeg decodes": functools.partial(simplejpeg.decode_jpeg, colorspace="RGB"),
    "hemoco decodes": decode_image,
    "one view, PIL": loaders.pil_view,
    "one view, fast": loaders.fast_view,
    "one view, hemoco": loaders.hemoco_one_view,
    "two views, PIL twice": loaders.pil_views_decoded_twice,
    "two views, PIL once": loaders.pil_views_decoded_once,
    "two views, hemoco": loaders.hemoco_two_views,
}
FROM_S3: dict[str, Callable[[str], Iterator[Tensor]]] = {
    "hemoco, two views": functools.partial(loaders.hemoco_batches, crops=2),
    "hemoco, one view": functools.partial(loaders.hemoco_batches, crops=1),
    "hemoco, fast": functools.partial(loaders.hemoco_stage_batches, view=loaders.fast_view),
    "webdataset, fast": functools.partial(loaders.webdataset_batches, view=loaders.fast_view),
    "webdataset, PIL": functools.partial(loaders.webdataset_batches, view=loaders.pil_view),
    "webdataset, two views, PIL twice": functools.partial(
        loaders.webdataset_batches, view=loaders.pil_views_decoded_twice
    ),
    "mosaicml-streaming, fast": functools.partial(loaders.mosaic_batches, view=loaders.fast_view),
    "mosaicml-streaming, PIL": functools.partial(loaders.mosaic_batches, view=loaders.pil_view),
    "litdata, fast": functools.partial(loaders.litdata_batches, view=loaders.fast_view),
    "litdata, PIL": functools.partial(loaders.litdata_batches, view=loaders.pil_view),
}
READING: dict[str, Callable[[str, int], Iterator[int]]] = {
    "reading, hemoco": loaders.hemoco_bytes,
    "reading, webdataset": loaders.webdataset_bytes,
}
PEERS = {"mosaicml-streaming": "mds", "litdata": "litdata"}
"""Distributions that hemoco's environment lacks, with the kind of data they read."""


class Cost(NamedTuple):
    """Time that some images took."""

    amount: float
    """Images, or gigabytes where only bytes are read."""
    cpu_s: float
    wall_s: float
    first_s: float
    """Until the first batch, starting included."""


def tree_cpu_s() -> float:
    """CPU time of this process and all that descend from it, those that have ended included."""
    children, used = defaultdict(list), {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(path.parent.name)
        children[int(fields[1])].append(pid)
        used[pid] = sum(map(int, fields[11:15]))  # own and waited-for children's, user and system
    found, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        found += used[pid]
        waiting += children[pid]
    return found / TICKS


def measure(batches: Callable[[], Iterable[object]], amount: Callable[[object], float]) -> Cost:
    """Takes all batches, from the start of the loader to the end of its processes."""
    cpu, begun, total, first_s = tree_cpu_s(), time.perf_counter(), 0.0, 0.0
    for batch in batches():
        first_s = first_s or time.perf_counter() - begun
        total += amount(batch)
    return Cost(total, tree_cpu_s() - cpu, time.perf_counter() - begun, first_s)


def without_start(
    batches: Callable[[str], Iterable[object]], amount: Callable[[object], float]
) -> Cost:
    """The cost of all images less that of a few, on S3."""
    few, whole = (functools.partial(batches, f"{URL}/{name}") for name in ("few", "all"))
    measure(few, amount)  # what is done once in a process
    start, cost = measure(few, amount), measure(whole, amount)
    return Cost(
        cost.amount - start.amount,
        cost.cpu_s - start.cpu_s,
        cost.wall_s - start.wall_s,
        start.first_s,
    )


def read_only(sizes: Callable[[str, int], Iterable[int]]) -> Cost:
    """Several passes over all images in this process, after one over a few."""
    sum(sizes(f"{URL}/few", 1))
    return measure(lambda: [sum(sizes(f"{URL}/all", PASSES))], lambda size: size / 1e9)


def in_memory(view: Callable[[bytes], object], photos: list[bytes]) -> Cost:
    """Photos in memory, dealt to as many processes as the loaders have."""
    begun = time.perf_counter()
    parts = [photos[part :: loaders.PROCESSES] for part in range(loaders.PROCESSES)]
    with multiprocessing.get_context("fork").Pool(loaders.PROCESSES) as pool:
        used = pool.map(functools.partial(_apply, view), parts, chunksize=1)
    return Cost(len(photos), sum(used), time.perf_counter() - begun, 0)


def _apply(view: Callable[[bytes], object], photos: list[bytes]) -> float:
    torch.set_num_threads(1)
    view(photos[0])
    begun = time.process_time()
    for photo in photos:
        view(photo)
    return time.process_time() - begun


def main() -> None:
    """Measures the method that the command line names and prints what it took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method, bucket = sys.argv[1], Path(sys.argv[2])
    found = _measure_method(method, bucket)
    peer = method.partition(",")[0]
    version = importlib.metadata.version(peer) if peer in PEERS else ""
    print(json.dumps(found._asdict() | {"version": version}))


def _measure_method(method: str, bucket: Path) -> Cost:
    if method in IN_MEMORY:
        return in_memory(IN_MEMORY[method], read_photos(bucket, "all"))
    if method in READING:
        return read_only(READING[method])
    return without_start(FROM_S3[method], len)
