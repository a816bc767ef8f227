"""hemoco's stream as the first stage of a webdataset pipeline.

    source = SampleSource(
        url, "train", config=StreamConfig(), seed=0, global_batch_size=256, rank=rank, world_size=n
    )
    pipeline = webdataset.DataPipeline(
        source, webdataset.decode("pil"), webdataset.to_tuple("jpg;png", "cls")
    )

It replaces `SimpleShardList`, `split_by_node`, `split_by_worker`, `tarfile_to_samples` and
`shuffle`.
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
    """One rank's samples of an epoch; in a DataLoader, each loader process yields a share of them.

    A sample is a dict as in webdataset: `__key__`, `__url__` of its tar, the encoded image under
    its suffix, and `cls` in ASCII where it is labelled. The samples of all ranks together are those
    of the epoch, for every number of ranks, and each rank has equally many.

    Args:
        url: URL of the shard folder.
        split: name of a split in its index.
        config: settings of the stream (`hemoco.data.stream.order` explains lanes and blocks);
            `workers` is not used, the DataLoader has its own.
        seed: seed of the order.
        global_batch_size: samples of all ranks in one step; a multiple of the lanes and of the
            world size.
        rank: rank of this process.
        world_size: number of ranks.

    Attributes:
        epoch: epoch of the next iteration, from 0. Set it before iterating; loader processes that
            persist over epochs do not see the change.

    Nothing is decoded here, so undecodable images are for the pipeline to handle. A few damaged
    samples are replaced and logged. Iterating raises ShardError where a shard was replaced or too
    many samples are damaged.

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
                f"global_batch_size is {global_batch_size}: it must be a multiple of {world_size} "
                "ranks"
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
        slots = _loader_slots(self._slots)
        slices = list(order.slices(*slots))
        portions = plan_portions(order, self.epoch, slots, 0)
        limit = BadSampleLimit(self._config.max_bad_share)
        reader = SampleReader(self._url, self._shards, portions, config=self._config, cache=None)
        with closing(reader):
            for step in range(order.steps):
                for read in reader.encoded(self.epoch, step, slices):
                    sample = {
                        "__key__": read.key,
                        "__url__": read.shard,
                        read.suffix: bytes(read.image),
                    }
                    if read.label >= 0:
                        sample["cls"] = str(read.label).encode()
                    yield sample
                counts = reader.take_counts()
                for bad in counts.bad:
                    logger.warning("event=bad_sample shard=%s key=%s reason=%s", *bad)
                limit.add(counts)


def _loader_slots(slots: tuple[int, int]) -> tuple[int, int]:
    """The share of a rank's slots that belongs to this loader process."""
    info = get_worker_info()
    if info is None:
        return slots
    first, count = slots[0], slots[1] - slots[0]
    start = first + count * info.id // info.num_workers
    stop = first + count * (info.id + 1) // info.num_workers
    return start, stop
