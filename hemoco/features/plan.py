"""What features of a data set follow from, where they go, and which of them are there already."""

import dataclasses
import hashlib

from hemoco.backbones.file import backbone_metadata, read_backbone
from hemoco.config import config_difference
from hemoco.config.checks import require, require_positive
from hemoco.data.shards.index import ShardIndex
from hemoco.errors import UsageError
from hemoco.features.parquet import FORMAT, FeatureFile, list_files, read_files
from hemoco.models.heads import Precision
from hemoco.storage.objects import absolute_url
from hemoco.tracking.models import SCHEME
from hemoco.tracking.versions import pinned

_IMAGENET_SIZE, _SMALL_SIZE = 224, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How images become features."""

    size: int
    """S, pixels."""
    resize: int
    """Pixels to which an image's shorter side is scaled before its centre is cut out."""
    precision: Precision = "float32"
    """In which the backbone computes; features of the lower ones are stored as float16."""
    batch_size: int = 256
    """Images computed at a time, N."""

    def __post_init__(self) -> None:
        require_positive(self, "embed", "size", "batch_size")
        require(
            self.resize >= self.size,
            f"embed.resize is {self.resize}: it must be at least size ({self.size})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedPlan:
    """All that the features of a data set follow from, and where they go; it travels to other machines."""

    shards_url: str
    data_digest: str
    classes: tuple[str, ...]
    backbone_url: str
    backbone_sha256: str
    """Of the file, hexadecimal."""
    dest: str
    config: EmbedConfig

    @property
    def identity(self) -> dict[str, str]:
        """Features that differ in none of this are equal, but for rounding."""
        return {
            "format": FORMAT,
            "backbone_sha256": self.backbone_sha256,
            "data_digest": self.data_digest,
            "layer": "pooled",
            "size": str(self.config.size),
            "resize": str(self.config.resize),
            "precision": self.config.precision,
        }


def fixed_url(backbone: str) -> str:
    """A backbone's name for other machines and for later: an absolute URL, or models:/m-... of one in the registry.

    Raises:
        UsageError, TrackingError: the registry has no such backbone, or cannot be used.
        StorageError: the scheme is none of ours.
    """
    return pinned(backbone) if backbone.startswith(SCHEME) else absolute_url(backbone)


def usual_size(backbone_url: str) -> int:
    """Pixels of images for a backbone: those of its pretraining; if unknown, 32 for the small stem, else 224.

    Raises:
        CheckpointError: the file is no backbone.
        StorageError, TrackingError: it cannot be read.
    """
    metadata = backbone_metadata(backbone_url)
    return int(
        metadata.get("size", _SMALL_SIZE if metadata.get("stem") == "small" else _IMAGENET_SIZE)
    )


def plan_embedding(
    shards: str, index: ShardIndex, backbone_url: str, dest: str, config: EmbedConfig
) -> EmbedPlan:
    """The plan for the features of a data set.

    Args:
        shards: URL of the shard folder.
        index: its index.
        backbone_url: as `fixed_url` gives it.
        dest: URL of the folder for the files.
        config: how images become features.

    Raises:
        StorageError, TrackingError: the backbone cannot be read.
    """
    return EmbedPlan(
        shards_url=shards,
        data_digest=index.digest,
        classes=index.classes,
        backbone_url=backbone_url,
        backbone_sha256=backbone_digest(backbone_url),
        dest=dest,
        config=config,
    )


def backbone_digest(url: str) -> str:
    """SHA-256 of a backbone's file, hexadecimal.

    Raises:
        StorageError, TrackingError: it cannot be read.
    """
    return hashlib.sha256(read_backbone(url)).hexdigest()


def finished_files(plan: EmbedPlan) -> dict[str, FeatureFile]:
    """The files of this plan that are there, by name.

    Raises:
        UsageError: a Parquet file there is of other features, or not hemoco's.
        StorageError: the storage refuses or does not answer.
    """
    names = list_files(plan.dest)
    found = dict(zip(names, read_files(plan.dest, names), strict=True))
    for name, file in found.items():
        there = {key: file.about[key] for key in plan.identity if key in file.about}
        if difference := config_difference(there, plan.identity):
            raise UsageError(
                f"{plan.dest} holds other features ({name}: {'; '.join(difference)}); choose another DEST, or remove "
                "these"
            )
    return found
