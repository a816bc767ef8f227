"""Labelled splits of any size, that frozen backbones are measured on.

Shapes: M images, B of them at a time, S x S pixels each.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hemoco.data.shards.index import Shard, read_index, read_tables
from hemoco.data.stream.batches import labelled_views
from hemoco.storage.retry import EVALUATION_PATIENCE_S

_BATCH = 256


class LabelledSplit(NamedTuple):
    """Labels in memory, images read when they are needed."""

    labels: Tensor
    """int64 (M,), classes counted from 0, -1 where there is none."""
    classes: tuple[str, ...]
    """Names of the classes, by label; empty where they are not known."""
    size: int
    """S."""
    identity: str
    """Equal ones have equal images."""
    batches: Callable[[], Iterator[Tensor]]
    """All images in their order, uint8 RGB (B, 3, S, S)."""


def open_split(data_url: str, split: str, size: int) -> LabelledSplit:
    """A split of a shard folder; images are scaled so that their shorter side is S, and their centre is cut out.

    Raises:
        ShardError: there are no shards or no such split, or a table is missing or damaged; iterating over the batches,
            an image has no label or cannot be decoded.
        StorageError: the storage refuses or does not answer.
    """
    index = read_index(data_url, patience_s=EVALUATION_PATIENCE_S)
    shards = index.split(split)
    return LabelledSplit(
        labels=torch.from_numpy(np.concatenate([table.labels for table in read_tables(data_url, shards)])),
        classes=index.classes,
        size=size,
        identity=f"{index.digest} {split}",
        batches=partial(_image_batches, data_url, shards, size),
    )


def some_images(data_url: str, split: str, *, size: int, count: int) -> Tensor:
    """About `count` images (M, 3, S, S) from all over a split, or all if there are not more; as in `open_split`.

    Only as many shards are read as are needed, evenly spaced: shards often lie sorted by class.
    """
    shards = read_index(data_url, patience_s=EVALUATION_PATIENCE_S).split(split)
    samples = sum(shard.samples for shard in shards)
    needed = min(len(shards), -(-count * len(shards) // max(samples, 1)))
    chosen = [shards[place * len(shards) // needed] for place in range(needed)]
    found = torch.cat(list(_image_batches(data_url, chosen, size)))
    return found[:: max(1, len(found) // count)]


def _image_batches(data_url: str, shards: Sequence[Shard], size: int) -> Iterator[Tensor]:
    views = labelled_views(data_url, shards, size=size, shorter=size)
    while some := [view.image for view in islice(views, _BATCH)]:
        yield torch.stack(some)
