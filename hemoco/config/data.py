"""Config classes for the data and for reading them; `hemoco.config` re-exports them."""

import dataclasses

from hemoco.config.checks import require_not_negative, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Location of the shards, and the use of their splits."""

    shards: str = ""
    """Folder that `python -m jobs pack` wrote: s3://bucket/prefix, file:///path or a path."""
    pretrain_split: str = "train"
    """Split that pretraining reads, without labels."""
    train_split: str = "train"
    """Labelled split that transfers are trained on; the bank of kNN."""
    test_split: str = "test"
    """Labelled split that transfers are evaluated on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Reading of shards into batches.

    Only `lanes` and `shards_per_block` decide which images make a batch (docs/architecture.md); the
    other settings may be changed when a run is resumed.
    """

    workers: int = 2
    """Loader processes per training worker; 0 loads in the training process itself."""
    lanes: int = 16
    """Equal parts into which an epoch is cut; every global batch takes as many images from each.
    Must divide the global batch size.
    With one for each loader process, or more, each process reads shards of its own."""
    shards_per_block: int = 4
    """Consecutive shards of a lane whose images are shuffled together.
    More of them shuffle better and need more memory."""
    memory_bytes: int = 2_000_000_000
    """Bytes of shards that a loader process holds in memory at most, read ahead included."""
    disk_cache_bytes: int = 0
    """Bytes of shards cached in $HEMOCO_HOME/shards at most; 0 caches none.
    All processes of a node share the cache, and later epochs use it again."""
    retry_s: float = 600.0
    """Seconds for which a failed read is retried before the run fails."""
    max_bad_share: float = 0.001
    """Share of undecodable or damaged samples, among those read, above which the run fails.
    Ten are always allowed."""

    def __post_init__(self) -> None:
        require_not_negative(self, "stream", "workers")
        require_positive(self, "stream", "lanes")
        require_positive(self, "stream", "shards_per_block")
        require_not_negative(
            self, "stream", "memory_bytes", "disk_cache_bytes", "retry_s", "max_bad_share"
        )
