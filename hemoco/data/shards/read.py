"""Samples out of the bytes of a shard, and whether they are the ones that were packed."""

from collections.abc import Sequence

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from hemoco.data.shards.table import SampleTable


def cut_out(
    parts: list[tuple[int, memoryview]], table: SampleTable, wanted: NDArray[np.int32]
) -> list[tuple[int, memoryview]]:
    """The images at some places of a shard, out of parts of it that begin at ascending bytes."""
    images = []
    for place in wanted.tolist():
        offset, size = int(table.offsets[place]), int(table.sizes[place])
        start, data = next(part for part in reversed(parts) if part[0] <= offset)
        images.append((place, data[offset - start : offset - start + size]))
    return images


def crc32c(image: memoryview) -> int:
    return int(google_crc32c.value(bytes(image)))


def damaged_images(images: Sequence[memoryview], table: SampleTable) -> NDArray[np.bool_]:
    """Which images are not those that were packed (M,)."""
    crcs = [google_crc32c.value(bytes(image)) for image in images]
    found: NDArray[np.bool_] = np.array(crcs, np.uint32) != table.crcs
    return found
