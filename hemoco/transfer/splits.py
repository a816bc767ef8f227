"""Labelled splits that frozen backbones are measured on: in memory, or of any size in storage.

Shapes: M images, B of them at a time, S x S pixels each.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hemoco.data.shards import Shard, read_index, read_table
from hemoco.data.stream import labelled_views
from hemoco.transfer.result import LabelledImages

_BATCH = 256
_THREADS = 16
_PATIENCE_S = 600.0


class LabelledShards(NamedTuple):
    """A labelled split in storage."""

    data_url: str
    """Of the shard folder."""
    shards: tuple[Shard, ...]
    size: int
    """S: images are scaled so that their shorter side has it, and their centre is cut out."""
    identity: str
    """Digest of the shard index, and split: equal ones have equal images."""
    labels: Tensor
    """int64 (M,), classes counted from 0, -1 where there is none."""
    classes: tuple[str, ...]
    """Names of the classes, by label."""


LabelledSplit = LabelledImages | LabelledShards


def open_split(data_url: str, split: str, size: int) -> LabelledShards:
    """A split of a shard folder; its labels are read, no image is.

    Raises:
        ShardError: there are no shards or no such split, or a table is missing or damaged.
        StorageError: the storage refuses or does not answer.
    """
    index = read_index(data_url, patience_s=_PATIENCE_S)
    shards = index.split(split)
    with ThreadPoolExecutor(_THREADS) as threads:
        labels = list(threads.map(lambda shard: read_table(data_url, shard).labels, shards))
    return LabelledShards(
        data_url, shards, size, f"{index.digest} {split}", torch.from_numpy(np.concatenate(labels)), index.classes
    )


def image_batches(split: LabelledSplit) -> Iterator[Tensor]:
    """All images in their order, uint8 (B, 3, S, S), at most 256 at a time.

    Raises:
        ShardError: an image has no label or cannot be decoded.
    """
    if isinstance(split, LabelledImages):
        yield from torch.split(split.images, _BATCH)
        return
    views = labelled_views(split.data_url, split.shards, size=split.size, shorter=split.size)
    while some := [view.image for view in islice(views, _BATCH)]:
        yield torch.stack(some)


def some_images(split: LabelledShards, count: int) -> Tensor:
    """About `count` images (M, 3, S, S) from all over a split, or all if there are not more.

    Only as many shards are read as are needed, evenly spaced: shards often lie sorted by class.
    """
    sizes = [shard.samples for shard in split.shards]
    needed = min(len(sizes), -(-count * len(sizes) // max(sum(sizes), 1)))
    chosen = [split.shards[place * len(sizes) // needed] for place in range(needed)]
    found = torch.cat(list(image_batches(split._replace(shards=tuple(chosen)))))
    return found[:: max(1, len(found) // count)]
