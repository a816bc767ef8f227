"""The plan of an embedding: the inputs, the destination, and the files already written."""

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
    """Settings of an embedding."""

    size: int
    """S, side of the centre view in pixels."""
    resize: int
    """Length in pixels of an image's shorter side before the centre is cut out."""
    precision: Precision = "float32"
    """Precision of the backbone's arithmetic; below float32, features are stored as float16."""
    batch_size: int = 256
    """N, images per forward pass."""

    def __post_init__(self) -> None:
        require_positive(self, "embed", "size", "batch_size")
        require(
            self.resize >= self.size,
            f"embed.resize is {self.resize}: it must be at least size ({self.size})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedPlan:
    """Everything that the features of a data set depend on, and their destination.

    It is pickled and sent to other machines.
    """

    shards_url: str
    data_digest: str
    classes: tuple[str, ...]
    backbone_url: str
    backbone_sha256: str
    """SHA-256 of the backbone's file, hexadecimal."""
    dest: str
    config: EmbedConfig

    @property
    def identity(self) -> dict[str, str]:
        """Features with equal values for all of these are equal up to rounding."""
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
    """A name of the backbone that stays valid later and on other machines.

    It is the absolute URL or, for a backbone in MLflow's registry, models:/m-...

    Raises:
        UsageError, TrackingError: the registry has no such backbone, or cannot be used.
        StorageError: the URL's scheme is not supported.
    """
    return pinned(backbone) if backbone.startswith(SCHEME) else absolute_url(backbone)


def usual_size(backbone_url: str) -> int:
    """The image size for a backbone in pixels, that of its pretraining.

    If it is unknown, as for imported backbones, it is 32 for the small stem and 224 otherwise.

    Raises:
        CheckpointError: the file is not a backbone.
        StorageError, TrackingError: the file cannot be read.
    """
    metadata = backbone_metadata(backbone_url)
    default = _SMALL_SIZE if metadata.get("stem") == "small" else _IMAGENET_SIZE
    return int(metadata.get("size", default))


def plan_embedding(
    shards: str, index: ShardIndex, backbone_url: str, dest: str, config: EmbedConfig
) -> EmbedPlan:
    """Makes the plan for the features of a data set; reads the backbone for its digest.

    Args:
        shards: URL of the shard folder.
        index: index of that folder.
        backbone_url: URL as returned by `fixed_url`.
        dest: URL of the folder for the files.
        config: settings of the embedding.

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
        StorageError, TrackingError: the file cannot be read.
    """
    return hashlib.sha256(read_backbone(url)).hexdigest()


def finished_files(plan: EmbedPlan) -> dict[str, FeatureFile]:
    """The files of this plan that have been written already, by name.

    Raises:
        UsageError: the destination has a Parquet file with other features or not from hemoco.
        StorageError: the storage refuses or does not answer.
    """
    names = list_files(plan.dest)
    files = dict(zip(names, read_files(plan.dest, names), strict=True))
    for name, file in files.items():
        identity = {key: file.about[key] for key in plan.identity if key in file.about}
        difference = config_difference(identity, plan.identity)
        if difference:
            raise UsageError(
                f"{plan.dest} holds other features ({name}: {'; '.join(difference)}); choose "
                "another DEST, or remove these"
            )
    return files
