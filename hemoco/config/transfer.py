"""What a transfer is: its config classes, re-exported by `hemoco.config`."""

import dataclasses
import re
from typing import Literal

from hemoco.config.checks import require, require_not_negative, require_positive
from hemoco.config.data import DataConfig, StreamConfig

_INIT = re.compile(r"(?P<label>[A-Za-z0-9_.-]+)(=(?P<source>.+))?")
_OWN_INITS = ("pretrained", "random", "supervised")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """What all transfers share. A transfer covers every init and seed it names."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Its data; an empty `shards` means the recipe's."""
    inits: tuple[str, ...] = ("pretrained", "random")
    """Backbones compared: `pretrained`, `random` (Kaiming), `supervised` (timm's weights of the architecture), or
    `NAME=URL` of any other backbone, for example one that `python -m jobs import` wrote."""
    seeds: tuple[int, ...] = (0,)
    """One repetition each; the inits of a seed are compared in pairs."""
    cpus: int = 1
    """CPU cores reserved, per process."""
    gpus: int = 0
    """GPUs reserved, per process."""

    def __post_init__(self) -> None:
        require(
            bool(self.inits), "transfers.inits is empty: name at least one of pretrained, random"
        )
        for init in self.inits:
            found = _INIT.fullmatch(init)
            require(
                found is not None and (found["source"] is None) == (found["label"] in _OWN_INITS),
                f"transfers.inits has {init!r}: allowed are {', '.join(_OWN_INITS)} and NAME=URL of a backbone "
                "(letters, digits, dot, dash and underscore in NAME)",
            )
        labels = [init_label(init) for init in self.inits]
        require(
            len(set(labels)) == len(labels), f"transfers.inits is {self.inits}: a name comes twice"
        )
        require(bool(self.seeds), "transfers.seeds is empty: name at least one")
        require(
            len(set(self.seeds)) == len(self.seeds),
            f"transfers.seeds is {self.seeds}: a seed comes twice",
        )
        require(
            min(self.seeds) >= 0, f"transfers.seeds is {self.seeds}: a seed must not be negative"
        )
        require(
            bool(self.data.shards) or self.data == DataConfig(),
            f"transfers.data is {self.data} without shards: a transfer's own data need --transfers.NAME.data.shards, "
            "splits of the recipe's data are set by --data",
        )
        require_positive(self, "transfers", "cpus")
        require(self.gpus in (0, 1), f"transfers.gpus is {self.gpus}: 0 or 1")


def init_label(init: str) -> str:
    """The name of an init in tables: all of it, or what stands before `=`."""
    return init.partition("=")[0]


def init_url(init: str) -> str:
    """The URL of an init `NAME=URL`; empty for the others."""
    return init.partition("=")[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnConfig(TransferConfig):
    """Weighted nearest-neighbour vote on frozen features (Wu et al. 2018, section 3.4)."""

    neighbours: int = 200
    """k."""
    temperature: float = 0.1
    """T of the vote's weight exp(similarity / T)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the similarities; bfloat16 is faster and moves the accuracy by up to 0.1 point."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "knn", "neighbours", "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(TransferConfig):
    """Linear classifiers on frozen, cached centre-crop features, a grid of settings trained at once.

    Fast, and not the papers' protocol, which augments: that is `LinearClassifierConfig`.
    """

    epochs: int = 100
    """Passes over the cached features."""
    batch_size: int = 256
    """Features per step."""
    lrs: tuple[float, ...] = (0.3, 3.0, 30.0)
    """Learning rates tried, each with every weight decay; the best pair on a held-out fifth of the training split is
    refitted on all of it."""
    weight_decays: tuple[float, ...] = (0.0,)
    """Weight decays tried."""
    lbfgs_check: bool = False
    """Fit a logistic regression by L-BFGS too, whose optimum no learning rate moves, and record its accuracy beside."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "linear_probe", "epochs", "batch_size")
        require(
            bool(self.lrs) and all(lr > 0 for lr in self.lrs),
            f"linear_probe.lrs is {self.lrs}: name at least one, all positive",
        )
        require(
            bool(self.weight_decays) and all(decay >= 0 for decay in self.weight_decays),
            f"linear_probe.weight_decays is {self.weight_decays}: name at least one, none negative",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowShotConfig(TransferConfig):
    """Linear classifier on frozen features of few labelled images, mean over several draws."""

    shots: int = 5
    """Labelled images per class; not used where `fraction` is set."""
    fraction: float = 0.0
    """Share of the labelled images of each class, for example 0.01; 0: `shots` counts."""
    draws: int = 10
    """Random draws per seed."""
    weight_decay: float = 1e-3
    """L2 penalty of the logistic regression on standardised features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "low_shot", "shots", "draws", "weight_decay")
        require(
            0 <= self.fraction < 1, f"low_shot.fraction is {self.fraction}: it must be in [0, 1)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedConfig(TransferConfig):
    """Transfers trained by SGD over many steps, in one process or several, that go on from a checkpoint."""

    workers: int = 1
    """Training processes; the global batch is split over them."""
    global_batch_size: int = 256
    """Images per optimiser step over all workers."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network; losses and optimiser are always float32."""
    log_every_steps: int = 20
    """Steps between two records in MLflow."""
    checkpoint_every_steps: int = 1000
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self,
            "transfers",
            "workers",
            "global_batch_size",
            "log_every_steps",
            "checkpoint_every_steps",
        )
        require(
            self.global_batch_size % self.workers == 0,
            f"transfers.global_batch_size is {self.global_batch_size}: it must be a multiple of transfers.workers "
            f"({self.workers})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(TrainedConfig):
    """A classifier trained on augmented images (random resized crop, flip)."""

    epochs: int = 100
    """Passes over the training split."""
    lr: float = 30.0
    """Of the classifier, at this global batch size."""
    schedule: Literal["step", "cosine"] = "step"
    """x0.1 at 60% and again at 80% of the epochs, or half a cosine; both change once per epoch."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate grows linearly."""
    weight_decay: float = 0.0
    """Of all that is trained."""
    size: int = 224
    """Side of an image in pixels."""
    resize: int = 256
    """Shorter side to which a test image is scaled before its centre is cut out."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of a training crop as a share of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    """Of the training split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "transfers", "epochs", "lr", "size")
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            f"transfers.crop_scale is {self.crop_scale}: shares of an image, in order",
        )
        require(0 <= self.flip <= 1, f"transfers.flip is {self.flip}: it must be in [0, 1]")
        require_not_negative(self, "transfers", "warmup_epochs", "weight_decay")
        require(
            self.resize >= self.size,
            f"transfers.resize is {self.resize}: it must be at least size ({self.size})",
        )
        require(
            self.global_batch_size % self.stream.lanes == 0,
            f"transfers.stream.lanes is {self.stream.lanes}: it must divide transfers.global_batch_size "
            f"({self.global_batch_size})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearClassifierConfig(ClassifierConfig):
    """The papers' linear protocol: the classifier is trained on augmented images, the backbone stays bit for bit.

    The defaults are those of MoCo v1 and v2 (He et al. 2020, section 4.1); those of v3 are lr 0.4 and cosine at batch
    1024, 90 epochs.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuneConfig(ClassifierConfig):
    """The whole network is trained."""

    epochs: int = 30
    lr: float = 0.1
    schedule: Literal["step", "cosine"] = "cosine"
    weight_decay: float = 1e-4
    backbone_lr: float = 0.01
    """Of the backbone's last stage, at this global batch size."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each stage of the backbone to the one before it; 1: all learn alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "fine_tune", "backbone_lr")
        require(
            0 < self.layer_decay <= 1,
            f"fine_tune.layer_decay is {self.layer_decay}: it must be in (0, 1]",
        )
