"""Labelled splits of any size, on which frozen backbones are evaluated.

Shapes: M images of a split, B of them at a time, S x S pixels each.
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
    """A split with its labels in memory and its images read when they are needed."""

    labels: Tensor
    """int64 (M,), classes counted from 0, -1 where there is none."""
    classes: tuple[str, ...]
    """Names of the classes, by label; empty where they are not known."""
    size: int
    """S."""
    identity: str
    """Splits of equal identity have equal images."""
    batches: Callable[[], Iterator[Tensor]]
    """Reads all images in their order, uint8 RGB (B, 3, S, S)."""


def open_split(data_url: str, index: ShardIndex, split: str, size: int) -> LabelledSplit:
    """A split of a shard folder, its images scaled to a shorter side of S and centre-cropped.
    Args:
        data_url: URL of the shard folder.
        index: its index.
        split: name of the split.
        size: S.

    Raises:
        ShardError: there is no such split, or a table is missing or damaged. While iterating over
            the batches: an image has no label or cannot be decoded.
        StorageError: the storage refuses or does not answer.
    """
    shards = index.split(split)
    labels = np.concatenate([table.labels for table in read_tables(data_url, shards)])
    return LabelledSplit(
        labels=torch.from_numpy(labels),  # (M,)
        classes=index.classes,
        size=size,
        identity=f"{index.digest} {split}",
        batches=partial(_image_batches, data_url, shards, size),
    )


def some_images(data_url: str, index: ShardIndex, split: str, *, size: int, count: int) -> Tensor:
    """About `count` images from all over a split, or all if it has fewer; made as in `open_split`.

    Reads only as many shards as it needs. They are evenly spaced, because shards are often sorted
    by class.

    Returns:
        uint8 (M, 3, S, S).
    """
    shards = index.split(split)
    samples = sum(shard.samples for shard in shards)
    needed = min(len(shards), -(-count * len(shards) // max(samples, 1)))
    chosen = [shards[number * len(shards) // needed] for number in range(needed)]
    images = torch.cat(list(_image_batches(data_url, chosen, size)))
    return images[:: max(1, len(images) // count)]


def _image_batches(data_url: str, shards: Sequence[Shard], size: int) -> Iterator[Tensor]:
    views = labelled_views(data_url, shards, size=size, shorter=size)
    while images := [view.image for view in islice(views, _BATCH)]:
        yield torch.stack(images)  # (B, 3, S, S)


class LabelledView(NamedTuple):
    """The centre of an image, with its label."""

    image: Tensor
    """uint8 (3, S, S)."""
    label: int
    key: str


def load_images(
    data_url: str, index: ShardIndex, split: str, size: int
) -> tuple[Tensor, Tensor, list[str]]:
    """Loads the centre views of a split that fits in memory.

    Returns:
        Images uint8 (M, 3, S, S), labels (M,) and keys.

    Raises:
        ShardError: an image has no label or cannot be decoded.
        StorageError: the storage refuses or does not answer.
    """
    shards = index.split(split)
    count = sum(shard.samples for shard in shards)
    images = torch.empty((count, 3, size, size), dtype=torch.uint8)
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
        data_url: URL of the shard folder.
        shards: some of its index.
        size: S.
        shorter: pixels to which the shorter side is scaled before the centre is cut out.

    Raises:
        ShardError: an image has no label or cannot be decoded.
        StorageError: the storage refuses or does not answer.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for shard in shards:
            view = partial(_labelled_view, url=shard_url(data_url, shard), size=size, side=shorter)
            yield from threads.map(view, read_shard(data_url, shard))


def _labelled_view(sample: Sample, *, url: str, size: int, side: int) -> LabelledView:
    if sample.label is None:
        raise ShardError(f"{url}: sample {sample.key} has no label; evaluate on a labelled split")
    try:
        image = decode_image(sample.image)
    except ShardError as error:
        raise ShardError(f"{url}: sample {sample.key}: {error}") from error
    return LabelledView(center_view(image, size, side), sample.label, sample.key)
