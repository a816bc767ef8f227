"""What a run is: frozen values, one class per component, checked when built.

The names here are the names of the command line (`--pretrain.optimizer.lr`) and of the MLflow params.
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
from hemoco.config.transfer import (
    FineTuneConfig,
    KnnConfig,
    LinearClassifierConfig,
    LinearProbeConfig,
    LowShotConfig,
)
from hemoco.names import NAME_RULE, is_name


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
        require_positive(self, "resources", "workers")
        require_positive(self, "resources", "cpus_per_worker")
        require(
            self.gpus_per_worker in (0, 1),
            f"resources.gpus_per_worker is {self.gpus_per_worker}: 0 or 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One MoCo pretraining."""

    epochs: int = 200
    """Passes over the pretraining split; the schedules end with them."""
    global_batch_size: int = 256
    """G, images per optimiser step over all workers."""
    accumulation_steps: int = 1
    """Parts of a worker's images that go through the encoders one after the other, to need less memory."""
    seed: int = 0
    """Of initialisation, sample order and augmentation."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the encoders; head, logits, loss, moving average and optimiser are always float32."""
    compile: bool = False
    """Compile the encoders (torch.compile): minutes at the start, faster steps."""
    log_every_steps: int = 10
    """Steps between two records in MLflow."""
    checkpoint_every_steps: int = 1000
    """Steps between two checkpoints."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every_steps: int = 0
    """Checkpoints of steps that are multiples of this are kept for good; 0 keeps none but the newest."""
    knn_every_epochs: int = 10
    """Epochs between two kNN evaluations on train_split and test_split; 0: none (unlabelled data)."""
    export_every_epochs: int = 0
    """Epochs between two backbones that are kept while training goes on, for `curve`; 0: only that of the end."""
    views: ViewsConfig = dataclasses.field(default_factory=ViewsConfig)
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    moco: MoCoConfig | MoCoV3Config = dataclasses.field(default_factory=MoCoConfig)
    """The method: v1 and v2 are one, v3 is another."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    resources: ResourcesConfig = dataclasses.field(default_factory=ResourcesConfig)

    def __post_init__(self) -> None:
        batch, workers = self.global_batch_size, self.resources.workers
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
            f"pretrain.keep_every_steps is {every}: it must be a multiple of pretrain.checkpoint_every_steps "
            f"({self.checkpoint_every_steps}), or 0",
        )
        require(
            batch > 0 and batch % workers == 0,
            f"pretrain.global_batch_size is {batch}: it must be a multiple of resources.workers ({workers})",
        )
        require(
            batch % self.stream.lanes == 0,
            f"pretrain.stream.lanes is {self.stream.lanes}: it must divide pretrain.global_batch_size ({batch})",
        )
        if isinstance(self.moco, MoCoConfig):
            self._check_queue(self.moco, batch // workers)
        else:
            require(
                self.accumulation_steps == 1,
                f"pretrain.accumulation_steps is {self.accumulation_steps}: it must be 1 for MoCo v3, whose negatives "
                "and batch statistics are those of the images that are computed at once; use more workers",
            )
            require(
                not self.compile,
                "pretrain.compile is True: batch statistics over all workers cannot be compiled",
            )

    def _check_queue(self, moco: MoCoConfig, per_worker: int) -> None:
        group, steps = moco.bn_group_size, self.accumulation_steps
        require(
            per_worker % (group * steps) == 0,
            f"pretrain.moco.bn_group_size is {group}: times pretrain.accumulation_steps ({steps}) it must divide the "
            f"{per_worker} images of one worker",
        )
        require(
            moco.queue_length % self.global_batch_size == 0,
            f"pretrain.moco.queue_length is {moco.queue_length}: it must be a multiple of "
            f"pretrain.global_batch_size ({self.global_batch_size})",
        )


def world_sizes(config: PretrainConfig) -> list[int]:
    """The numbers of workers, up to the configured one, on which this training is the same; ascending."""
    batch, sizes = config.global_batch_size, range(1, config.resources.workers + 1)
    # v3 takes its batch statistics over all workers
    group = (
        config.moco.bn_group_size * config.accumulation_steps
        if isinstance(config.moco, MoCoConfig)
        else 1
    )
    return [size for size in sizes if batch % size == 0 and (batch // size) % group == 0]


AnyTransferConfig = (
    KnnConfig
    | LinearProbeConfig
    | LowShotConfig
    | LinearClassifierConfig
    | FineTuneConfig
    | FasterRcnnConfig
    | MaskRcnnConfig
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: data, pretraining and the transfers that measure it."""

    name: str
    """Short name, part of the run's default name."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)
    transfers: dict[str, AnyTransferConfig] = dataclasses.field(default_factory=dict)
    max_parallel_transfers: int = 8
    """Transfers that run at the same time, at most."""
    curve: tuple[str, ...] = ()
    """Transfers that are measured on every backbone of `pretrain.export_every_epochs` too, while the pretraining goes
    on, on other cores and GPUs: transfer quality over epochs."""
    sweep: SweepConfig | None = None
    """What `python -m jobs sweep` searches; the other verbs do not look at it."""

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
            f"curve is {self.curve} but pretrain.export_every_epochs is 0: set it to the epochs between two backbones",
        )
        if self.sweep is not None:
            self._check_sweep(self.sweep)

    def _check_sweep(self, sweep: SweepConfig) -> None:
        allowed = {name for name in flat_params({"pretrain": self.pretrain}) if not is_free(name)}
        check_space(sweep.space, self, allowed - {"pretrain.knn_every_epochs"})
        require(
            sweep.objective in self.transfers,
            f"sweep.objective is {sweep.objective!r}: the recipe's transfers are {list(self.transfers)}",
        )
        require(
            sweep.watch in ("", KNN, *self.curve),
            f"sweep.watch is {sweep.watch!r}: {KNN}, a transfer of the recipe's curve {list(self.curve)}, or empty",
        )
        require(
            sweep.watch != KNN or self.pretrain.knn_every_epochs > 0,
            f"sweep.watch is {KNN} but pretrain.knn_every_epochs is 0: set it to the epochs between two evaluations",
        )
        require(
            sweep.grace_epochs <= self.pretrain.epochs,
            f"sweep.grace_epochs is {sweep.grace_epochs}: pretrain.epochs is {self.pretrain.epochs}",
        )
