"""Shuffling quality of an order: hemoco's lanes and blocks compared with three other ways.

The others are a full permutation, webdataset's buffer and single chunks. A sample is named by its
place in the unshuffled data, shard after shard.

Shapes: B batches of G samples.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import webdataset.filters
from numpy.typing import NDArray

from hemoco.data.stream.order import EpochOrder

CLASSES = 1000
Samples = NDArray[np.int64]


class Quality(NamedTuple):
    """Shuffling quality of the median batch."""

    effective_shards: float
    classes: float
    """Different classes, were the data sorted by 1,000 of them."""


def quality(sizes: Samples, batches: Samples) -> Quality:
    """Measures how well mixed batches (B, G) are, for data with these samples per shard."""
    first = np.concatenate([[0], np.cumsum(sizes)])
    shards = np.searchsorted(first, batches, "right") - 1
    return Quality(effective_shards(shards), classes_seen(batches * CLASSES // first[-1]))


def effective_shards(shards: Samples) -> float:
    """Number of shards that a batch seems to be drawn from.

    This is the inverse Simpson index, median over batches (B, G).
    """
    shares = [np.unique(batch, return_counts=True)[1] / len(batch) for batch in shards]
    return float(np.median([1 / np.square(share).sum() for share in shares]))


def classes_seen(classes: Samples) -> float:
    """Different classes in a batch, median over batches (B, G)."""
    return float(np.median([len(np.unique(batch)) for batch in classes]))


def lane_batches(sizes: Samples, *, lanes: int, block: int, batch: int, steps: int) -> Samples:
    """Batches of hemoco's order (B, G), spread over an epoch."""
    order = EpochOrder(
        sizes, seed=0, epoch=0, lanes=lanes, shards_per_block=block, global_batch_size=batch
    )
    first = np.concatenate([[0], np.cumsum(sizes)])
    chosen = np.linspace(0, order.steps - 1, steps).astype(int).tolist()
    rows = np.stack([order.samples(step, 0, batch) for step in chosen])  # (B, G, 2)
    return first[rows[..., 0]] + rows[..., 1]


def permutation_batches(samples: int, *, batch: int, steps: int) -> Samples:
    """Batches of a full permutation (B, G)."""
    return np.random.default_rng(0).choice(samples, (steps, batch), replace=False)


def worker_batches(
    streams: Sequence[Iterator[int]], *, ranks: int, batch: int, steps: int
) -> Samples:
    """Global batches (B, G) of ranks whose DataLoaders take turns over workers, as torch's does.

    Args:
        streams: one for each worker, those of a rank together.
        ranks: each gives an equal part of a batch, all of it from one worker.
    """
    workers, part = len(streams) // ranks, batch // ranks
    parts = [
        list(itertools.islice(streams[rank * workers + step % workers], part))
        for step in range(steps)
        for rank in range(ranks)
    ]
    return np.array(parts).reshape(steps, batch)


def buffer_streams(sizes: Samples, *, workers: int, buffer: int) -> list[Iterator[int]]:
    """webdataset: shards are dealt to the workers, and each worker has a shuffle buffer.

    The buffer is filled before anything leaves it.
    """
    deal = np.random.default_rng(0).permutation(len(sizes))
    first = np.concatenate([[0], np.cumsum(sizes)]).tolist()

    def stream(worker: int) -> Iterator[int]:
        shards = deal[worker::workers].tolist()
        return itertools.chain.from_iterable(
            range(first[shard], first[shard + 1]) for shard in shards
        )

    shuffle = webdataset.filters._shuffle
    return [
        shuffle(stream(worker), buffer, buffer, rng=random.Random(worker))
        for worker in range(workers)
    ]


def chunk_streams(samples: int, *, workers: int, chunk: int) -> list[Iterator[int]]:
    """One chunk at a time in each worker, shuffled as a whole.

    litdata does this with its chunks of 64 MB.
    """
    rng = np.random.default_rng(0)
    deal = rng.permutation(samples // chunk).tolist()

    def stream(worker: int) -> Iterator[int]:
        for number in deal[worker::workers]:
            yield from (rng.permutation(chunk) + number * chunk).tolist()

    return [stream(worker) for worker in range(workers)]
