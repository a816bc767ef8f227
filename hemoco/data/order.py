"""Which samples make which global batch: a pure function of sizes, seed and epoch, the same for every world size.

The shards of a split, permuted anew each epoch, form one line of samples. The line is cut into equal lanes; a lane is
read in blocks of a few consecutive shards, each block shuffled as a whole. A global batch takes an equal slice of
every lane. So a rank reads only the shards of its own lanes, every rank has the same number of steps, and any step
can be computed without the ones before it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hemoco.errors import ConfigError

_SHARDS, _BLOCK = 0, 1  # purposes of a draw, part of its key


class EpochOrder:
    """The sample order of one epoch.

    Args:
        sizes: samples per shard.
        lanes: parallel lanes; divides `global_batch_size`.
        shards_per_block: consecutive shards of a lane that are shuffled together.

    Attributes:
        steps: global batches in the epoch. Fewer than `lanes + global_batch_size` samples are left out, others each
            epoch; no sample comes twice.

    Raises:
        ConfigError: the split has fewer samples than one global batch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        epoch: int,
        lanes: int,
        shards_per_block: int,
        global_batch_size: int,
    ) -> None:
        samples = sum(sizes)
        if samples < global_batch_size:
            raise ConfigError(
                f"pretrain.global_batch_size is {global_batch_size}: the split has only {samples} samples; "
                f"set it to at most {samples} or pack more data"
            )
        self._key = (seed, epoch)
        self._shards_per_block = shards_per_block
        self._slice = global_batch_size // lanes
        self.steps = samples // lanes // self._slice
        self._lane_length = self.steps * self._slice
        draws = _generator(*self._key, _SHARDS)
        self._shards = draws.permutation(len(sizes))
        self._line = np.concatenate([[0], np.cumsum(np.asarray(sizes)[self._shards])])  # first sample of each shard
        # a random start, so that the samples left out at both ends are others each epoch even with a single shard
        self._start = int(draws.integers(samples - lanes * self._lane_length + 1))
        self._blocks: dict[tuple[int, int], NDArray[np.int64]] = {}  # one per lane: a lane only moves on

    def samples(self, step: int, first_slot: int, last_slot: int) -> NDArray[np.int64]:
        """Slots [first_slot, last_slot) of a global batch as rows (shard number, sample number within the shard)."""
        width = self._slice
        parts = []
        for lane in range(first_slot // width, -(-last_slot // width)):
            begin, end = max(first_slot - lane * width, 0), min(last_slot - lane * width, width)
            parts.append(self._lane(lane, step * width + begin, step * width + end))
        line = np.concatenate(parts)
        places = np.searchsorted(self._line, line, "right") - 1
        return np.stack([self._shards[places], line - self._line[places]], axis=1)

    def _lane(self, lane: int, begin: int, end: int) -> NDArray[np.int64]:
        """Places on the line of the samples [begin, end) of a lane."""
        low = self._start + lane * self._lane_length
        high = low + self._lane_length
        first_shard, parts = self._shard_at(low), []
        while begin < end:
            block = (self._shard_at(low + begin) - first_shard) // self._shards_per_block
            edge = first_shard + block * self._shards_per_block
            block_low = max(low, int(self._line[edge]))
            block_high = min(high, int(self._line[min(edge + self._shards_per_block, len(self._shards))]))
            shuffled = self._block(lane, block, block_low, block_high)
            stop = min(end, block_high - low)
            parts.append(shuffled[low + begin - block_low : low + stop - block_low])
            begin = stop
        return np.concatenate(parts)

    def _block(self, lane: int, block: int, low: int, high: int) -> NDArray[np.int64]:
        if (lane, block) not in self._blocks:
            self._blocks.pop((lane, block - 1), None)
            self._blocks[lane, block] = low + _generator(*self._key, _BLOCK, lane, block).permutation(high - low)
        return self._blocks[lane, block]

    def _shard_at(self, place: int) -> int:
        return int(np.searchsorted(self._line, place, "right")) - 1


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
