"""Small shard folders for tests of reading; images are 0, 1, 2, ..., and so are their keys."""

import hashlib
import io
import itertools
from collections.abc import Container, Sequence

import numpy as np
from PIL import Image

from hemoco.data.shards.index import Shard, ShardIndex, write_index, write_table
from hemoco.data.shards.tar import Sample, encode_shard, parse_tar
from hemoco.storage.objects import join_url, write_bytes


def png(number: int) -> bytes:
    """Returns a 12 x 10 image in which every pixel has the value `number` (modulo 256)."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), number % 256, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write_shards(
    url: str, sizes: Sequence[int], *, bad: Container[int] = (), labelled: bool = True
) -> str:
    """Writes shards of these sizes and their index; returns the URL.

    Samples whose number is in `bad` are not images.
    """
    numbers, shards = itertools.count(), []
    for place, size in enumerate(sizes):
        rows = [next(numbers) for _ in range(size)]
        image = {row: b"not an image" if row in bad else png(row) for row in rows}
        data = encode_shard(
            [
                Sample(str(row), image[row], row % 3 if labelled else None, suffix="png")
                for row in rows
            ]
        )
        shard = Shard(
            f"train-{place:06d}.tar", "train", size, len(data), hashlib.sha256(data).hexdigest()
        )
        write_bytes(join_url(url, shard.name), data)
        write_table(url, shard, parse_tar(data, shard.name).table)
        shards.append(shard)
    write_index(url, ShardIndex(tuple(shards), ("a", "b", "c"), ()))
    return url
