"""The order of samples: a pure function of shard sizes, seed and epoch, at any number of ranks.

For each step of an epoch, `EpochOrder` computes which sample fills which slot of the global batch.
Let G be the size of the global batch and L the number of lanes, which divides G. An epoch is made
in four steps:

1. Permute the shards. Laid end to end, they form the epoch's sequence of samples.
2. Cut L lanes of equal length out of the sequence, one after the other from a random start. Their
   length is the largest multiple of G / L that fits; fewer than G samples are left out, at both
   ends of the sequence.
3. In each lane, join every few consecutive shards (`shards_per_block`) into a block, and permute
   the samples of each block.
4. Global batch t takes the samples [t G / L, (t + 1) G / L) of each lane. Lane l fills the slots
   [l G / L, (l + 1) G / L).

Eight shards of two samples, two lanes, two shards per block, G = 4; each digit is a sample, named
by its shard:

    sequence   55 00  33 66  11 77  22 44
    lane 0     05 50  63 36                      two blocks, each permuted
    lane 1                   71 17  42 42
    batch 0    05            71
    batch 1       50            17
    batch 2           63            42
    batch 3              36            42

A rank owns a range of the slots, and each loader process of the rank owns a part of that range. The
number of ranks decides only who reads a sample, never where it stands in the order.

**Why not a shuffle buffer.** webdataset deals the shards out to the processes. Each process streams
its tars and shuffles what passes through a buffer of some thousand samples. This needs no index
and reads each tar in one pass, but:

- The order depends on the number of ranks and loader processes.
- The buffer is state that no checkpoint holds, so a resumed epoch repeats some samples and skips
  others.
- Ranks whose shards have more samples have more steps. They wait in a collective for the others
  until it times out, unless the epoch is cut short or samples are drawn with replacement.

Here the order is computed in advance instead of drawn as the data pass by:

- **Elastic**: a run continues on another number of GPUs with the same global batches.
- **Exact on resume**: any step is computed without the steps before it, so a checkpoint needs
  nothing but (epoch, step).
- **Even**: every rank has the same number of steps, and no sample comes twice in an epoch. Each
  epoch leaves out fewer than G samples, others each time.
- **Well mixed**: a global batch draws on L blocks at once. With 64 lanes and blocks of 4 shards,
  1,024 samples out of 1,282 shards of 1,000 are as mixed as if drawn from 215 shards (inverse
  Simpson index). A full permutation gives 570; 32 webdataset processes on 8 ranks with buffers of
  5,000 samples give 75 (tests/benchmarks/shuffle_quality.py).

**Why not a full permutation.** It is mixed better and just as exact. But then each sample costs a
request of its own, and each process stores an entry for each sample. With lanes and blocks, a rank
reads only the shards of its own lanes, mostly whole. It keeps an entry for each shard and a
permutation for each open block.

The price is that shard sizes must be known in advance (hence the index that `pack` writes), and
that the open blocks of its lanes must fit in the memory of a loader process
(`StreamConfig.memory_bytes`). With more loader processes than lanes, several of them read the same
shards.

`plan_portions` turns the order into what one loader process reads, block by block.

Shapes: R samples, each a row (shard number, sample number within the shard). Ranges are half open:
[start, stop).
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hemoco.errors import ConfigError

# The purpose of a draw is part of its key, so that no two draws use the same random numbers. The
# views of data/transforms.py have 2.
_DRAW_SHARDS, _DRAW_BLOCK = 0, 1


class Block(NamedTuple):
    """Consecutive shards of a lane that are shuffled together."""

    lane: int
    number: int
    """Counted from 0 within the lane."""
    start: int
    """Position in the lane of its first sample."""
    stop: int
    """Position in the lane after its last sample."""


class LaneSlice(NamedTuple):
    """The part of one lane in a global batch that belongs to a range of slots."""

    lane: int
    start: int
    """First slot, counted from the lane's first slot."""
    stop: int


class EpochOrder:
    """The sample order of one epoch.

    Args:
        sizes: samples per shard.
        seed: seed of the run.
        epoch: counted from 0.
        lanes: L; divides `global_batch_size`.
        shards_per_block: consecutive shards of a lane that are shuffled together.
        global_batch_size: G.

    Attributes:
        steps: global batches in the epoch.
        slots_per_lane: G / L, the slots of each lane in a global batch.
        left_out: samples that this epoch leaves out, fewer than G.

    Raises:
        ConfigError: the split has fewer than G samples, or L does not divide G.
    """

    def __init__(
        self,
        sizes: Sequence[int] | NDArray[np.int64],
        *,
        seed: int,
        epoch: int,
        lanes: int,
        shards_per_block: int,
        global_batch_size: int,
    ) -> None:
        if global_batch_size % lanes:
            raise ConfigError(
                f"stream.lanes is {lanes}: it must divide the global batch size "
                f"({global_batch_size})"
            )
        counts = np.asarray(sizes, np.int64)
        samples = int(counts.sum())
        if samples < global_batch_size:
            raise ConfigError(
                f"global_batch_size is {global_batch_size}: the split has only {samples} samples; "
                f"set it to at most {samples} or pack more data"
            )
        self.steps, self.left_out = divmod(samples, global_batch_size)
        self.slots_per_lane = global_batch_size // lanes
        self._lane_length = self.steps * self.slots_per_lane  # samples
        self._shards_per_block = shards_per_block
        self._key = (seed, epoch)

        draws = _generator(*self._key, _DRAW_SHARDS)
        self._shards = draws.permutation(len(counts))
        # Position in the sequence at which each permuted shard starts; the last entry is the end.
        self._shard_starts = np.concatenate([[0], np.cumsum(counts[self._shards])])
        # Lane 0 starts at a random position. Otherwise the samples left out would always be the
        # last of the sequence, and with a single shard the same ones in every epoch.
        self._first_lane_start = int(draws.integers(self.left_out + 1))
        # The block of each lane that was shuffled last. A lane is read forwards, so one is enough.
        self._shuffled: dict[int, tuple[Block, NDArray[np.int32]]] = {}

    def samples(self, step: int, start_slot: int, stop_slot: int) -> NDArray[np.int32]:
        """Samples in the slots [start_slot, stop_slot) of a global batch, in their order.

        Returns:
            Rows (shard number, sample number within the shard), (stop_slot - start_slot, 2).
        """
        parts = []
        for lane, start, stop in self.slices(start_slot, stop_slot):
            position = step * self.slots_per_lane + start
            end = step * self.slots_per_lane + stop
            while position < end:  # a slice may reach over several blocks
                block = self._block_at(lane, position)
                part_end = min(end, block.stop)
                rows = self.block_samples(block)
                parts.append(rows[position - block.start : part_end - block.start])
                position = part_end
        return np.concatenate(parts)

    def slices(self, start_slot: int, stop_slot: int) -> Iterator[LaneSlice]:
        """Lanes of the slots [start_slot, stop_slot), each with the part that lies in these slots.

        The same for every step.
        """
        first_lane = start_slot // self.slots_per_lane
        last_lane = (stop_slot - 1) // self.slots_per_lane
        for lane in range(first_lane, last_lane + 1):
            lane_slot = lane * self.slots_per_lane
            start = max(start_slot - lane_slot, 0)
            stop = min(stop_slot - lane_slot, self.slots_per_lane)
            yield LaneSlice(lane, start, stop)

    def blocks(self, lane: int, first_step: int) -> Iterator[Block]:
        """Blocks of a lane in their order, from the one in which a step begins."""
        position = first_step * self.slots_per_lane
        while position < self._lane_length:
            block = self._block_at(lane, position)
            yield block
            position = block.stop

    def block_samples(self, block: Block) -> NDArray[np.int32]:
        """All samples of a block in their shuffled order.

        Returns:
            Rows (shard number, sample number within the shard), (block.stop - block.start, 2).
        """
        known = self._shuffled.get(block.lane)
        if known is not None and known[0] == block:
            return known[1]
        generator = _generator(*self._key, _DRAW_BLOCK, block.lane, block.number)
        block_start = self._lane_start(block.lane) + block.start
        size = block.stop - block.start
        positions = block_start + generator.permutation(size)  # (R,) in the sequence
        # Search among the few shards of the block only: a search in the whole sequence takes twice
        # as long with 100,000 shards, because it misses the CPU's cache.
        first_shard = self._shard_at(block_start)
        last_shard = self._shard_at(block_start + size - 1)
        later_starts = self._shard_starts[first_shard + 1 : last_shard + 1]
        shards = first_shard + np.searchsorted(later_starts, positions, "right")  # (R,)
        rows = np.empty((size, 2), np.int32)
        rows[:, 0] = self._shards[shards]
        rows[:, 1] = positions - self._shard_starts[shards]
        self._shuffled[block.lane] = block, rows
        return rows

    def _block_at(self, lane: int, position: int) -> Block:
        """The block that holds the sample at a position of a lane."""
        lane_start = self._lane_start(lane)
        lane_stop = lane_start + self._lane_length
        # A lane begins and ends wherever the equal cut falls, mostly inside a shard. Both lanes
        # then read that shard, and the outer blocks of a lane end at the cut.
        lane_shard = self._shard_at(lane_start)
        number = (self._shard_at(lane_start + position) - lane_shard) // self._shards_per_block
        first_shard = lane_shard + number * self._shards_per_block
        next_shard = min(first_shard + self._shards_per_block, len(self._shards))
        start = max(lane_start, int(self._shard_starts[first_shard]))
        stop = min(lane_stop, int(self._shard_starts[next_shard]))
        return Block(lane, number, start - lane_start, stop - lane_start)

    def _lane_start(self, lane: int) -> int:
        return self._first_lane_start + lane * self._lane_length

    def _shard_at(self, position: int) -> int:
        """Index, among the permuted shards, of the shard that holds a position of the sequence."""
        # "right" passes over empty shards, which start where the next one does
        return int(np.searchsorted(self._shard_starts, position, "right")) - 1


def _generator(*key: int) -> np.random.Generator:
    """A generator of its own for each draw, so that no draw depends on those before it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class Portion(NamedTuple):
    """The samples of one block that one loader process reads."""

    epoch: int
    first_step: int
    """The first step that needs some of them."""
    block: Block
    rows: NDArray[np.int32]
    """(shard number, sample number within the shard) in the order of the steps, (R, 2)."""


def plan_portions(
    order: EpochOrder, epoch: int, slots: tuple[int, int], first_step: int
) -> Iterator[Portion]:
    """Portions that a loader process reads from a step on, in the order in which it needs them.

    Args:
        order: order of the epoch.
        epoch: its number, for the portions.
        slots: the process's range of slots [start, stop).
        first_step: the step to begin with.
    """
    lanes = [_lane_portions(order, epoch, part, first_step) for part in order.slices(*slots)]
    return heapq.merge(*lanes, key=lambda portion: portion.first_step)


def _lane_portions(
    order: EpochOrder, epoch: int, part: LaneSlice, first_step: int
) -> Iterator[Portion]:
    width = order.slots_per_lane
    for block in order.blocks(part.lane, first_step):
        first = max(block.start, first_step * width)  # position in the lane
        rows = order.block_samples(block)[first - block.start :]
        # A process that owns all slots of the lane reads the whole block, and nothing is copied.
        if part.stop - part.start < width:
            slots = np.arange(first, block.stop) % width
            owned = np.flatnonzero((slots >= part.start) & (slots < part.stop))
            if not len(owned):
                continue
            first += int(owned[0])
            rows = rows[owned]
        yield Portion(epoch, first // width, block, rows)
