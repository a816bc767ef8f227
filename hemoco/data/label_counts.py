"""How many images of each class there are, told by the tables of samples alone.

Shapes: C classes.
"""

import numpy as np
from numpy.typing import NDArray

from hemoco.data.shards.index import Shard, ShardIndex, read_tables
from hemoco.errors import ShardError


def count_labels(url: str, index: ShardIndex) -> dict[str, NDArray[np.int64]]:
    """For each split the images of each class and, last, those without a label (C + 1,).

    Raises:
        ShardError: a table is missing, damaged, or has labels beyond the classes.
        StorageError: the storage refuses or does not answer.
    """
    counts = {split: np.zeros(len(index.classes) + 1, np.int64) for split in index.splits}
    for shard, table in zip(index.shards, read_tables(url, index.shards), strict=True):
        counts[shard.split] += _count(shard, table.labels, len(index.classes))
    return counts


def _count(shard: Shard, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    if labels.max(initial=-1) >= classes:
        raise ShardError(f"{shard.name}: label {labels.max()}, the index has {classes} classes; pack the data again")
    return np.bincount(np.where(labels < 0, classes, labels), minlength=classes + 1).astype(np.int64)
