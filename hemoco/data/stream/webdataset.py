"""hemoco's stream as the first stage of a webdataset pipeline.

    source = SampleSource(url, "train", config=StreamConfig(), seed=0, global_batch_size=256, rank=rank, world_size=n)
    pipeline = webdataset.DataPipeline(source, webdataset.decode("pil"), webdataset.to_tuple("jpg;png", "cls"))

It stands where `SimpleShardList`, `split_by_node`, `split_by_worker`, `tarfile_to_samples` and `shuffle` would.
"""

import logging
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from hemoco.config import StreamConfig
from hemoco.data.shards.index import ShardColumns, read_index
from hemoco.data.stream.bad_samples import BadSampleLimit
from hemoco.data.stream.order import EpochOrder, plan_portions
from hemoco.data.stream.reader import SampleReader
from hemoco.errors import ConfigError

logger = logging.getLogger(__name__)


class SampleSource(IterableDataset[dict[str, Any]]):
    """The samples of one epoch that a rank, and in a DataLoader each of its loader processes, has to process.

    A sample is a dict as webdataset's: `__key__`, `__url__` of its tar, the encoded image under its suffix, and `cls`
    in ASCII where it is labelled. The ranks' samples together are the epoch's, whatever the number of ranks, and each
    has as many.

    Args:
        url: of the shard folder.
        split: of its index.
        config: lanes, blocks and memory; the loader processes are the DataLoader's.
        seed: of the order.
        global_batch_size: samples of all ranks in one step; a multiple of the lanes and of the world size.
        rank: of this process.
        world_size: number of ranks.

    Attributes:
        epoch: the epoch that the next iteration gives; set it before, from 0. Persistent loader processes do not see
            it.

    Iterating raises ShardError where a shard is another than was packed, or too many samples are damaged; a few are
    replaced, and logged. Images are not decoded here, so undecodable ones are the pipeline's to handle.

    Raises:
        ShardError: the folder has no index or no such split.
        ConfigError: the world size does not divide the global batch size.
    """

    def __init__(
        self,
        url: str,
        split: str,
        *,
        config: StreamConfig,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        if global_batch_size % world_size:
            raise ConfigError(
                f"global_batch_size is {global_batch_size}: it must be a multiple of {world_size} ranks"
            )
        self.epoch = 0
        self._url, self._config, self._seed, self._size = url, config, seed, global_batch_size
        self._shards = ShardColumns(read_index(url).split(split))
        self._slots = (
            global_batch_size * rank // world_size,
            global_batch_size * (rank + 1) // world_size,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = EpochOrder(
            self._shards.samples,
            seed=self._seed,
            epoch=self.epoch,
            lanes=self._config.lanes,
            shards_per_block=self._config.shards_per_block,
            global_batch_size=self._size,
        )
        slots = _share(self._slots)
        pieces = list(order.slices(*slots))
        portions = plan_portions(order, self.epoch, slots, 0)
        limit = BadSampleLimit(self._config.max_bad_share)
        reader = SampleReader(self._url, self._shards, portions, config=self._config, cache=None)
        with closing(reader):
            for step in range(order.steps):
                for read in reader.encoded(self.epoch, step, pieces):
                    sample = {
                        "__key__": read.key,
                        "__url__": read.shard,
                        read.suffix: bytes(read.image),
                    }
                    yield sample | ({"cls": str(read.label).encode()} if read.label >= 0 else {})
                counts = reader.take_counts()
                for bad in counts.bad:
                    logger.warning("event=bad_sample shard=%s key=%s reason=%s", *bad)
                limit.add(counts)


def _share(slots: tuple[int, int]) -> tuple[int, int]:
    """The slots of this loader process among those of its rank."""
    info = get_worker_info()
    if info is None:
        return slots
    first, count = slots[0], slots[1] - slots[0]
    return first + count * info.id // info.num_workers, first + count * (
        info.id + 1
    ) // info.num_workers
