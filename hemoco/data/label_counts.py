"""How many images of each class there are, told by the tables of samples alone.

Shapes: C classes.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from hemoco.data.shards import Shard, ShardIndex, read_table
from hemoco.errors import ShardError

_THREADS = 16


def count_labels(url: str, index: ShardIndex) -> dict[str, NDArray[np.int64]]:
    """For each split the images of each class and, last, those without a label (C + 1,).

    Raises:
        ShardError: a table is missing, damaged, or has labels beyond the classes.
        StorageError: the storage refuses or does not answer.
    """
    counts = {split: np.zeros(len(index.classes) + 1, np.int64) for split in index.splits}
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda shard: _count_shard(url, shard, len(index.classes)), index.shards)
        for shard, of_shard in zip(index.shards, found, strict=True):
            counts[shard.split] += of_shard
    return counts


def _count_shard(url: str, shard: Shard, classes: int) -> NDArray[np.int64]:
    labels = read_table(url, shard).labels
    if labels.max(initial=-1) >= classes:
        raise ShardError(f"{shard.name}: label {labels.max()}, the index has {classes} classes; pack the data again")
    return np.bincount(np.where(labels < 0, classes, labels), minlength=classes + 1).astype(np.int64)
