"""What a run is: frozen values, one class per component, checked when built.

The names here are the names of the command line (`--pretrain.optimizer.lr`) and of the MLflow params.
"""

import dataclasses
import hashlib
import json
from typing import Any, Literal

from hemoco.errors import ConfigError

_FREE_SETTINGS = (
    "pretrain.resources.",
    "pretrain.log_every_steps",
    "pretrain.checkpoint_every_steps",
    "pretrain.keep_last",
    *(
        f"pretrain.stream.{name}"
        for name in ("workers", "memory_bytes", "disk_cache_bytes", "retry_s", "max_bad_share")
    ),
    "max_parallel_transfers",
)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


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
class ViewsConfig:
    """Augmentation of the two views (MoCo v2, Chen et al. 2020, section 2)."""

    size: int = 224
    """Side of a view in pixels."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random resized crop as a fraction of the image."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Strength: factor drawn from [1 - b, 1 + b]."""
    contrast: float = 0.4
    """Strength: factor drawn from [1 - c, 1 + c]."""
    saturation: float = 0.4
    """Strength: factor drawn from [1 - s, 1 + s]."""
    hue: float = 0.1
    """Strength: shift drawn from [-h, h] turns of the colour circle."""
    grayscale: float = 0.2
    """Probability of conversion to grey."""
    blur: float = 0.5
    """Probability of Gaussian blur, sigma drawn from [0.1, 2] pixels."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted per channel, images in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divided by per channel."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        _require(self.size >= 8, f"views.size is {self.size}: it must be at least 8 pixels")
        _require(0 < low <= high <= 1, f"views.crop_scale is {self.crop_scale}: it must satisfy 0 < low <= high <= 1")
        for name in ("jitter", "grayscale", "blur", "flip"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"views.{name} is {value}: a probability must be in [0, 1]")
        _require(0 <= self.hue <= 0.5, f"views.hue is {self.hue}: it must be in [0, 0.5]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The ResNet, by its timm name."""

    architecture: str = "resnet50"
    """A timm ResNet: resnet10t, resnet18, resnet50, wide_resnet50_2, ..."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """`small`: 3x3 convolution of stride 1 and no max-pooling, for images of 32 pixels."""
    zero_init_last: bool = False
    """Start the last BN of each residual block at zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoConfig:
    """The contrastive method (He et al. 2020, section 3; Chen et al. 2020)."""

    embedding_size: int = 128
    """C, size of a query or key."""
    head: Literal["linear", "mlp", "mlp_bn"] = "mlp"
    """Projection head: v1 linear, v2 mlp; mlp_bn adds batch normalisation after the hidden layer."""
    queue_length: int = 65536
    """K, number of queued negatives."""
    momentum: float = 0.999
    """m of the key encoder's moving average."""
    temperature: float = 0.2
    """T of the InfoNCE loss."""
    bn_group_size: int = 32
    """Images that share batch statistics; keys are shuffled over the global batch before they are grouped."""

    def __post_init__(self) -> None:
        _require(self.queue_length > 0, f"moco.queue_length is {self.queue_length}: it must be positive")
        _require(0 <= self.momentum <= 1, f"moco.momentum is {self.momentum}: it must be in [0, 1]")
        _require(self.temperature > 0, f"moco.temperature is {self.temperature}: it must be positive")
        _require(self.bn_group_size >= 2, f"moco.bn_group_size is {self.bn_group_size}: it must be at least 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with momentum; weight decay on all parameters, as the official recipes."""

    lr: float = 0.03
    """Learning rate at this recipe's global batch size."""
    momentum: float = 0.9
    """SGD momentum, no Nesterov."""
    weight_decay: float = 1e-4
    """On all parameters, BN and biases included."""
    schedule: Literal["cosine", "step"] = "cosine"
    """`cosine` to 0, or `step`: x0.1 at 60% and 80% of the epochs; both set once per epoch."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up from 0, set per step."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optimizer.lr is {self.lr}: it must be positive")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}: it must not be negative")


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
        _require(self.workers >= 0, f"stream.workers is {self.workers}: it must not be negative")
        _require(self.lanes > 0, f"stream.lanes is {self.lanes}: it must be positive")
        _require(self.shards_per_block > 0, f"stream.shards_per_block is {self.shards_per_block}: it must be positive")
        for name in ("memory_bytes", "disk_cache_bytes", "retry_s", "max_bad_share"):
            _require(getattr(self, name) >= 0, f"stream.{name} is {getattr(self, name)}: it must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """Processes and devices of a training."""

    workers: int = 1
    """Training processes (ranks)."""
    cpus_per_worker: int = 1
    """CPU cores reserved for each."""
    gpus_per_worker: int = 0
    """GPUs reserved for each; 0 trains on the CPU."""

    def __post_init__(self) -> None:
        _require(self.workers > 0, f"resources.workers is {self.workers}: it must be positive")
        _require(self.cpus_per_worker > 0, f"resources.cpus_per_worker is {self.cpus_per_worker}: it must be positive")
        _require(self.gpus_per_worker in (0, 1), f"resources.gpus_per_worker is {self.gpus_per_worker}: 0 or 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One MoCo pretraining."""

    epochs: int = 200
    """Passes over the pretraining split; the schedules end with them."""
    global_batch_size: int = 256
    """G, images per optimiser step over all workers."""
    seed: int = 0
    """Of initialisation, sample order and augmentation."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the encoders; head, logits, loss and moving average are always float32."""
    log_every_steps: int = 10
    """Steps between two records in MLflow."""
    checkpoint_every_steps: int = 1000
    """Steps between two checkpoints."""
    keep_last: int = 2
    """Checkpoints kept."""
    knn_every_epochs: int = 10
    """Epochs between two kNN evaluations on train_split and test_split; 0: none (unlabelled data)."""
    views: ViewsConfig = dataclasses.field(default_factory=ViewsConfig)
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    moco: MoCoConfig = dataclasses.field(default_factory=MoCoConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    resources: ResourcesConfig = dataclasses.field(default_factory=ResourcesConfig)

    def __post_init__(self) -> None:
        batch, workers = self.global_batch_size, self.resources.workers
        for name in ("epochs", "log_every_steps", "checkpoint_every_steps", "keep_last"):
            _require(getattr(self, name) > 0, f"pretrain.{name} is {getattr(self, name)}: it must be positive")
        _require(
            batch > 0 and batch % workers == 0,
            f"pretrain.global_batch_size is {batch}: it must be a multiple of resources.workers ({workers})",
        )
        group = self.moco.bn_group_size
        _require(
            (batch // workers) % group == 0,
            f"pretrain.moco.bn_group_size is {group}: it must divide the {batch // workers} images of one worker",
        )
        _require(
            self.moco.queue_length % batch == 0,
            f"pretrain.moco.queue_length is {self.moco.queue_length}: it must be a multiple of "
            f"pretrain.global_batch_size ({batch})",
        )
        _require(
            batch % self.stream.lanes == 0,
            f"pretrain.stream.lanes is {self.stream.lanes}: it must divide pretrain.global_batch_size ({batch})",
        )


def world_sizes(config: PretrainConfig) -> list[int]:
    """The numbers of workers, up to the configured one, on which this training is the same; ascending."""
    batch, group = config.global_batch_size, config.moco.bn_group_size
    sizes = range(1, config.resources.workers + 1)
    return [size for size in sizes if batch % size == 0 and (batch // size) % group == 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """What all transfers share. A transfer covers every init and seed it names."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Its data; an empty `shards` means the recipe's."""
    inits: tuple[str, ...] = ("pretrained", "random")
    """Backbones compared: `pretrained`, `random` (Kaiming)."""
    seeds: tuple[int, ...] = (0,)
    """One repetition each."""
    cpus: int = 1
    """CPU cores reserved."""
    gpus: int = 0
    """GPUs reserved."""

    def __post_init__(self) -> None:
        allowed = {"pretrained", "random"}
        _require(bool(self.inits), "transfers.inits is empty: name at least one of pretrained, random")
        _require(set(self.inits) <= allowed, f"transfers.inits is {self.inits}: allowed are pretrained and random")
        _require(bool(self.seeds), "transfers.seeds is empty: name at least one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnConfig(TransferConfig):
    """Weighted nearest-neighbour vote on frozen features (Wu et al. 2018, section 3.4)."""

    neighbours: int = 200
    """k."""
    temperature: float = 0.1
    """T of the vote's weight exp(similarity / T)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(TransferConfig):
    """Linear classifier on frozen, cached centre-crop features (not the paper's augmented protocol)."""

    epochs: int = 100
    """Passes over the cached features."""
    batch_size: int = 256
    """Features per step."""
    lrs: tuple[float, ...] = (0.3, 3.0, 30.0)
    """Learning rates tried; the best on a held-out fifth of the training split is refitted on all of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowShotConfig(TransferConfig):
    """Linear classifier on frozen features of n labelled images per class, mean over several draws."""

    shots: int = 5
    """Labelled images per class."""
    draws: int = 10
    """Random draws per seed."""
    weight_decay: float = 1e-3
    """L2 penalty of the logistic regression on standardised features."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRcnnConfig(TransferConfig):
    """Mask R-CNN with a ResNet-FPN, fine-tuned whole (torchvision)."""

    steps: int = 90_000
    """Optimiser steps."""
    batch_size: int = 16
    """Images per step."""
    flip: float = 0.5
    """Probability of a horizontal flip in training; 0 where mirrored objects are others, as digits."""
    lr: float = 0.02
    """Learning rate at this batch size."""
    weight_decay: float = 1e-4
    """Not on normalisation layers."""
    warmup_steps: int = 1000
    """Steps of linear warm-up."""
    min_size: int = 800
    """Shorter side images are scaled to, pixels."""
    max_size: int = 1333
    """Longer side at most, pixels."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Anchor side per pyramid level, pixels; the last level is the pooled one."""
    fpn_channels: int = 256
    """Channels of the pyramid."""
    box_features: int = 1024
    """Hidden size of the box head."""
    rois_per_image: int = 512
    """Proposals sampled per training image."""
    proposals: int = 1000
    """Proposals kept per image after RPN's NMS, in training twice as many."""
    max_detections: int = 100
    """Detections kept per image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(len(self.anchor_sizes) == 5, f"mask_rcnn.anchor_sizes is {self.anchor_sizes}: five sizes are needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: data, pretraining and the transfers that measure it."""

    name: str
    """Short name, part of the run's default name."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)
    transfers: dict[str, KnnConfig | LinearProbeConfig | LowShotConfig | MaskRcnnConfig] = dataclasses.field(
        default_factory=dict
    )
    max_parallel_transfers: int = 8
    """Transfers that run at the same time, at most."""


def flat_params(config: Any) -> dict[str, str]:
    """A config as dotted names and their values, exactly the names one types on the command line."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, dict):
            for name, item in value.items():
                walk(f"{prefix}.{name}" if prefix else name, item)
        else:
            flat[prefix] = str(value)

    walk("", config)
    return flat


def config_digest(config: Any) -> str:
    """Eight hexadecimal digits that differ when any setting differs that changes a result."""
    settings = {name: value for name, value in flat_params(config).items() if not _is_free(name)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def config_difference(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Lines `name: old -> new` for every setting that differs between two flat configs and changes a result."""
    names = sorted(name for name in old.keys() | new.keys() if not _is_free(name))
    return [f"{n}: {old.get(n, '(unset)')} -> {new.get(n, '(unset)')}" for n in names if old.get(n) != new.get(n)]


def _is_free(name: str) -> bool:
    """Whether a setting says where and how fast something is computed, not what: a run may go on with another."""
    return name.startswith(_FREE_SETTINGS) or name.removeprefix("recipe.").startswith(_FREE_SETTINGS)
