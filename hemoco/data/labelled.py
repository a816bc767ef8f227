"""Labelled splits of any size, that frozen backbones are measured on.

Shapes: M images, B of them at a time, S x S pixels each.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hemoco.data.decode import decode_image
from hemoco.data.shards.index import Shard, ShardIndex, read_shard, read_tables, shard_url
from hemoco.data.shards.tar import Sample
from hemoco.data.transforms import center_view
from hemoco.errors import ShardError

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


def open_split(data_url: str, index: ShardIndex, split: str, size: int) -> LabelledSplit:
    """A split of a shard folder; images are scaled so that their shorter side is S, and their centre is cut out.

    Args:
        data_url: URL of the shard folder.
        index: its index.
        split: name of the split.
        size: S.

    Raises:
        ShardError: there is no such split, or a table is missing or damaged; iterating over the batches, an image has
            no label or cannot be decoded.
        StorageError: the storage refuses or does not answer.
    """
    shards = index.split(split)
    return LabelledSplit(
        labels=torch.from_numpy(
            np.concatenate([table.labels for table in read_tables(data_url, shards)])
        ),
        classes=index.classes,
        size=size,
        identity=f"{index.digest} {split}",
        batches=partial(_image_batches, data_url, shards, size),
    )


def some_images(data_url: str, index: ShardIndex, split: str, *, size: int, count: int) -> Tensor:
    """About `count` images (M, 3, S, S) from all over a split, or all if there are not more; as in `open_split`.

    Only as many shards are read as are needed, evenly spaced: shards often lie sorted by class.
    """
    shards = index.split(split)
    samples = sum(shard.samples for shard in shards)
    needed = min(len(shards), -(-count * len(shards) // max(samples, 1)))
    chosen = [shards[place * len(shards) // needed] for place in range(needed)]
    found = torch.cat(list(_image_batches(data_url, chosen, size)))
    return found[:: max(1, len(found) // count)]


def _image_batches(data_url: str, shards: Sequence[Shard], size: int) -> Iterator[Tensor]:
    views = labelled_views(data_url, shards, size=size, shorter=size)
    while some := [view.image for view in islice(views, _BATCH)]:
        yield torch.stack(some)


class LabelledView(NamedTuple):
    """The centre of an image."""

    image: Tensor
    """uint8 (3, S, S)."""
    label: int
    key: str


def load_images(
    data_url: str, index: ShardIndex, split: str, size: int
) -> tuple[Tensor, Tensor, list[str]]:
    """All centre views of a split that fits in memory: uint8 (M, 3, S, S), labels (M,) and keys.

    Raises:
        ShardError: an image has no label or cannot be decoded.
    """
    shards = index.split(split)
    images = torch.empty((sum(shard.samples for shard in shards), 3, size, size), dtype=torch.uint8)
    labels, keys = [], []
    for row, view in enumerate(labelled_views(data_url, shards, size=size, shorter=size)):
        images[row] = view.image
        labels.append(view.label)
        keys.append(view.key)
    return images, torch.tensor(labels, dtype=torch.int64), keys


def labelled_views(
    data_url: str, shards: Sequence[Shard], *, size: int, shorter: int
) -> Iterator[LabelledView]:
    """The centre views of some shards, one after the other.

    Args:
        data_url: of the shard folder.
        shards: some of its index.
        size: S.
        shorter: side in pixels to which the shorter one is scaled before the centre is cut out.

    Raises:
        ShardError: an image has no label or cannot be decoded.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for shard in shards:
            where = shard_url(data_url, shard)
            yield from threads.map(
                lambda sample, where=where: _labelled_view(sample, where, size, shorter),
                read_shard(data_url, shard),
            )


def _labelled_view(sample: Sample, where: str, size: int, shorter: int) -> LabelledView:
    if sample.label is None:
        raise ShardError(f"{where}: sample {sample.key} has no label; evaluate on a labelled split")
    try:
        image = decode_image(sample.image)
    except ShardError as error:
        raise ShardError(f"{where}: sample {sample.key}: {error}") from error
    return LabelledView(center_view(image, size, shorter), sample.label, sample.key)
