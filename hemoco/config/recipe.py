"""Config classes of a whole run: recipe, pretraining, resources; `hemoco.config` re-exports them.

The values are frozen and are checked when they are built. Names of fields are the names of the
command line (`--pretrain.optimizer.lr`) and of the params in MLflow.
"""

import dataclasses
from typing import Literal

from hemoco.config.checks import require, require_choices, require_not_negative, require_positive
from hemoco.config.data import DataConfig, StreamConfig
from hemoco.config.detection import FasterRcnnConfig, MaskRcnnConfig
from hemoco.config.method import (
    EncoderConfig,
    MoCoConfig,
    MoCoV3Config,
    OptimizerConfig,
    ViewsConfig,
)
from hemoco.config.settings import flat_params, is_free
from hemoco.config.sweep import KNN, SweepConfig, check_space
from hemoco.config.transfer import AnyClassificationConfig
from hemoco.names import NAME_RULE, is_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """Processes and devices of the pretraining."""

    workers: int = 1
    """Training processes (ranks).
    After a loss fewer are used until there is room for all again; the result is the same."""
    cpus_per_worker: int = 1
    """CPU cores reserved for each training process."""
    gpus_per_worker: int = 0
    """GPUs reserved for each training process, 0 or 1; 0 trains on the CPU."""

    def __post_init__(self) -> None:
        require_positive(self, "resources", "workers")
        require_positive(self, "resources", "cpus_per_worker")
        require(
            self.gpus_per_worker in (0, 1),
            f"resources.gpus_per_worker is {self.gpus_per_worker}: 0 or 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A MoCo pretraining."""

    epochs: int = 200
    """Passes over the pretraining split; the schedules end with the last one."""
    global_batch_size: int = 256
    """G, images in an optimiser step, over all workers. The learning rate is not scaled with it."""
    accumulation_steps: int = 1
    """Parts in which a worker's images go through the query encoder, to save memory.
    Up to rounding the result is that of one part. MoCo v1 and v2 only."""
    seed: int = 0
    """Seed of initial weights, order of the samples, augmentation and shuffling."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the encoders.
    Head, logits, loss, moving average and optimiser are always float32."""
    compile: bool = False
    """Compile the encoders with torch.compile: takes minutes at the start, makes steps faster.
    MoCo v1 and v2 only."""
    log_every_steps: int = 10
    """Optimiser steps between two records in MLflow."""
    checkpoint_every_steps: int = 1000
    """Optimiser steps between two checkpoints."""
    keep_last: int = 2
    """Newest checkpoints to keep; with two, a run survives damage to the newest."""
    keep_every_steps: int = 0
    """Checkpoints of steps that are multiples of this are kept for good; 0 keeps none.
    Must be a multiple of `checkpoint_every_steps`."""
    knn_every_epochs: int = 10
    """Epochs between two kNN evaluations on `train_split` and `test_split`; 0 for none.
    Unlabelled data require 0."""
    export_every_epochs: int = 0
    """Epochs between two backbones that are exported while training continues, for `curve`.
    0 exports only the last backbone."""
    views: ViewsConfig = dataclasses.field(default_factory=ViewsConfig)
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    moco: MoCoConfig | MoCoV3Config = dataclasses.field(default_factory=MoCoConfig)
    """The method: `MoCoConfig` for v1 and v2, `MoCoV3Config` for v3."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    resources: ResourcesConfig = dataclasses.field(default_factory=ResourcesConfig)

    def __post_init__(self) -> None:
        batch = self.global_batch_size
        workers = self.resources.workers
        require_positive(
            self,
            "pretrain",
            "epochs",
            "log_every_steps",
            "checkpoint_every_steps",
            "keep_last",
            "accumulation_steps",
        )
        require_not_negative(self, "pretrain", "knn_every_epochs", "export_every_epochs")
        every = self.keep_every_steps
        require(
            every >= 0 and every % self.checkpoint_every_steps == 0,
            f"pretrain.keep_every_steps is {every}: it must be a multiple of "
            f"pretrain.checkpoint_every_steps ({self.checkpoint_every_steps}), or 0",
        )
        require(
            batch > 0 and batch % workers == 0,
            f"pretrain.global_batch_size is {batch}: it must be a multiple of resources.workers "
            f"({workers})",
        )
        require(
            batch % self.stream.lanes == 0,
            f"pretrain.stream.lanes is {self.stream.lanes}: it must divide "
            f"pretrain.global_batch_size ({batch})",
        )
        if isinstance(self.moco, MoCoConfig):
            self._check_queue(self.moco, batch // workers)
        else:
            require(
                self.accumulation_steps == 1,
                f"pretrain.accumulation_steps is {self.accumulation_steps}: it must be 1 for "
                "MoCo v3, whose negatives and batch statistics are those of the images that are "
                "computed at once; use more workers",
            )
            require(
                not self.compile,
                "pretrain.compile is True: batch statistics over all workers cannot be compiled",
            )

    def _check_queue(self, moco: MoCoConfig, per_worker: int) -> None:
        group, steps = moco.bn_group_size, self.accumulation_steps
        require(
            per_worker % (group * steps) == 0,
            f"pretrain.moco.bn_group_size is {group}: the images of one worker in a step "
            f"({per_worker}) must be a multiple of it times pretrain.accumulation_steps ({steps})",
        )
        require(
            moco.queue_length % self.global_batch_size == 0,
            f"pretrain.moco.queue_length is {moco.queue_length}: it must be a multiple of "
            f"pretrain.global_batch_size ({self.global_batch_size})",
        )


def world_sizes(config: PretrainConfig) -> list[int]:
    """The numbers of workers, up to the configured one, that give the same training; ascending."""
    batch = config.global_batch_size
    group = 1  # v3 takes its BN statistics over all workers, however many they are
    if isinstance(config.moco, MoCoConfig):
        group = config.moco.bn_group_size * config.accumulation_steps
    sizes = range(1, config.resources.workers + 1)
    return [size for size in sizes if batch % size == 0 and (batch // size) % group == 0]


AnyTransferConfig = AnyClassificationConfig | FasterRcnnConfig | MaskRcnnConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: data, pretraining, and the transfers that measure it."""

    name: str
    """Short name of the recipe, part of the default name of a run."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)
    transfers: dict[str, AnyTransferConfig] = dataclasses.field(default_factory=dict)
    """Transfers, by names of your choice."""
    max_parallel_transfers: int = 8
    """Transfers that run at the same time, at most."""
    curve: tuple[str, ...] = ()
    """Names of transfers that also measure every backbone of `pretrain.export_every_epochs`.
    They run beside the pretraining, on cores and GPUs that it leaves free."""
    sweep: SweepConfig | None = None
    """The search of `python -m jobs sweep`; other verbs ignore it."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(is_name(self.name), f"recipe.name is {self.name!r}: allowed are {NAME_RULE}")
        for name in self.transfers:
            require(
                is_name(name),
                f"the recipe has a transfer {name!r}: allowed in its name are {NAME_RULE}",
            )
        unknown = [name for name in self.curve if name not in self.transfers]
        require(
            not unknown, f"curve names {unknown}: the recipe's transfers are {list(self.transfers)}"
        )
        require(
            not self.curve or self.pretrain.export_every_epochs > 0,
            f"curve is {self.curve} but pretrain.export_every_epochs is 0: set it to the epochs "
            "between two backbones",
        )
        if self.sweep is not None:
            self._check_sweep(self.sweep)

    def _check_sweep(self, sweep: SweepConfig) -> None:
        allowed = {name for name in flat_params({"pretrain": self.pretrain}) if not is_free(name)}
        allowed -= {"pretrain.knn_every_epochs"}  # it measures the result and does not change it
        check_space(sweep.space, self, allowed)
        require(
            sweep.objective in self.transfers,
            f"sweep.objective is {sweep.objective!r}: the recipe's transfers are "
            f"{list(self.transfers)}",
        )
        require(
            sweep.watch in ("", KNN, *self.curve),
            f"sweep.watch is {sweep.watch!r}: {KNN}, a transfer of the recipe's curve "
            f"{list(self.curve)}, or empty",
        )
        require(
            sweep.watch != KNN or self.pretrain.knn_every_epochs > 0,
            f"sweep.watch is {KNN} but pretrain.knn_every_epochs is 0: set it to the epochs "
            "between two evaluations",
        )
        require(
            sweep.grace_epochs <= self.pretrain.epochs,
            f"sweep.grace_epochs is {sweep.grace_epochs}: pretrain.epochs is "
            f"{self.pretrain.epochs}, and it must not be higher",
        )
