"""Where data are and how they are read: config classes, re-exported by `hemoco.config`."""

import dataclasses

from hemoco.config.checks import require_not_negative, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Shards and which of their splits serve for what."""

    shards: str = ""
    """URL of a folder written by `python -m jobs pack` (s3://bucket/prefix, file:///path or a path)."""
    pretrain_split: str = "train"
    """Split for pretraining; labels are not read."""
    train_split: str = "train"
    """Labelled split that fits probes and fills the kNN bank."""
    test_split: str = "test"
    """Labelled split that is evaluated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How shards become batches."""

    workers: int = 2
    """Loader processes per training worker; 0 loads in the training process."""
    lanes: int = 16
    """Parallel lanes of the two-level shuffle; must divide the global batch size."""
    shards_per_block: int = 4
    """Consecutive shards of a lane that are shuffled together."""
    memory_bytes: int = 2_000_000_000
    """Most shard bytes a loader process holds in memory: the open blocks and what is read ahead."""
    disk_cache_bytes: int = 0
    """Most bytes of shards kept in $HEMOCO_HOME/shards for all processes of a node and later epochs; 0 keeps none."""
    retry_s: float = 600.0
    """Seconds for which a read that fails is tried again."""
    max_bad_share: float = 0.001
    """Share of undecodable or damaged samples above which the run stops; ten are always allowed."""

    def __post_init__(self) -> None:
        require_not_negative(self, "stream", "workers")
        require_positive(self, "stream", "lanes")
        require_positive(self, "stream", "shards_per_block")
        require_not_negative(
            self, "stream", "memory_bytes", "disk_cache_bytes", "retry_s", "max_bad_share"
        )
