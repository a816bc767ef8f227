"""Config classes of the transfers but for detection; `hemoco.config` re-exports them."""

import dataclasses
import re
from typing import Literal

from hemoco.config.checks import require, require_not_negative, require_positive
from hemoco.config.data import DataConfig, StreamConfig

__all__ = [
    "ClassifierConfig",
    "FineTuneConfig",
    "KnnConfig",
    "LinearClassifierConfig",
    "LinearProbeConfig",
    "LowShotConfig",
    "TrainedConfig",
    "TransferConfig",
    "init_label",
    "init_url",
]
"""Exported by `hemoco.config`: a new transfer's class is added here and to the type at the end."""

_INIT = re.compile(r"(?P<label>[A-Za-z0-9_.-]+)(=(?P<source>.+))?")
_OWN_INITS = ("pretrained", "random", "supervised")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Settings of every transfer; it runs once for each pair of an init and a seed."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Data of this transfer; without `shards`, those of the recipe."""
    inits: tuple[str, ...] = ("pretrained", "random")
    """Backbones to compare: `pretrained`, `random` (Kaiming), `supervised` (timm's weights).
    `NAME=URL` is any other backbone, for example one that `python -m jobs import` wrote."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one repetition for each; differences between inits are paired by seed."""
    cpus: int = 1
    """CPU cores reserved for each process."""
    gpus: int = 0
    """GPUs reserved for each process, 0 or 1."""

    def __post_init__(self) -> None:
        require(
            bool(self.inits), "transfers.inits is empty: name at least one of pretrained, random"
        )
        for init in self.inits:
            match = _INIT.fullmatch(init)
            # our own inits have no URL, all others must have one
            require(
                match is not None and (match["source"] is None) == (match["label"] in _OWN_INITS),
                f"transfers.inits has {init!r}: allowed are {', '.join(_OWN_INITS)} and NAME=URL "
                "of a backbone (letters, digits, dot, dash and underscore in NAME)",
            )
        labels = [init_label(init) for init in self.inits]
        require(
            len(set(labels)) == len(labels),
            f"transfers.inits is {self.inits}: a name is given twice",
        )
        require(bool(self.seeds), "transfers.seeds is empty: name at least one")
        require(
            len(set(self.seeds)) == len(self.seeds),
            f"transfers.seeds is {self.seeds}: a seed is given twice",
        )
        require(
            min(self.seeds) >= 0, f"transfers.seeds is {self.seeds}: a seed must not be negative"
        )
        require(
            bool(self.data.shards) or self.data == DataConfig(),
            f"transfers.data is {self.data} without shards: a transfer's own data need "
            "--transfers.NAME.data.shards, splits of the recipe's data are set by --data",
        )
        require_positive(self, "transfers", "cpus")
        require(self.gpus in (0, 1), f"transfers.gpus is {self.gpus}: 0 or 1")


def init_label(init: str) -> str:
    """The name of an init in tables: the part before `=`, or all of it if there is none."""
    return init.partition("=")[0]


def init_url(init: str) -> str:
    """The URL of an init `NAME=URL`; empty for other inits."""
    return init.partition("=")[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnConfig(TransferConfig):
    """Weighted vote of the nearest neighbours, on frozen features.

    Wu et al. 2018 (arXiv:1805.01978), section 3.4, with the k and T of MoCo's CIFAR-10 notebook.
    Published figures use several k and T: compare only equal ones (docs/official-recipes.md).
    """

    neighbours: int = 200
    """k, number of neighbours that vote."""
    temperature: float = 0.1
    """T; a neighbour's vote has the weight exp(cosine similarity / T)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the similarities.
    bfloat16 is faster and changes the accuracy by up to 0.1 percentage points."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "knn", "neighbours", "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(TransferConfig):
    """Linear classifiers on frozen, cached features of centre crops; a grid of them at once.

    Fast, but not the protocol of the papers, which augments images: that is
    `LinearClassifierConfig`.
    """

    epochs: int = 100
    """Passes over the cached features."""
    batch_size: int = 256
    """Features in an optimiser step."""
    lrs: tuple[float, ...] = (0.3, 3.0, 30.0)
    """Learning rates to try, each with every weight decay.
    The best pair on a held-out fifth of the training split is trained again on the whole split."""
    weight_decays: tuple[float, ...] = (0.0,)
    """Weight decays to try."""
    lbfgs_check: bool = False
    """Fit a logistic regression by L-BFGS too and record its accuracy.
    Its optimum depends on no learning rate: a large difference shows that the grid is narrow."""

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
    """Logistic regression on frozen features of few labelled images; mean over several draws."""

    shots: int = 5
    """Labelled images of each class; ignored if `fraction` is set."""
    fraction: float = 0.0
    """Share of the labelled images of each class, in [0, 1), for example 0.01; 0: use `shots`."""
    draws: int = 10
    """Random draws of the images for each seed."""
    weight_decay: float = 1e-3
    """L2 penalty of the logistic regression, on standardised features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "low_shot", "shots", "draws", "weight_decay")
        require(
            0 <= self.fraction < 1, f"low_shot.fraction is {self.fraction}: it must be in [0, 1)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedConfig(TransferConfig):
    """Transfers trained by SGD, in one process or several; they resume from checkpoints."""

    workers: int = 1
    """Training processes (ranks); the global batch is split over them."""
    global_batch_size: int = 256
    """Images in an optimiser step, over all workers."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network; losses and optimiser are always float32."""
    log_every_steps: int = 20
    """Optimiser steps between two records in MLflow."""
    checkpoint_every_steps: int = 1000
    """Optimiser steps between two checkpoints."""

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
            f"transfers.global_batch_size is {self.global_batch_size}: it must be a multiple of "
            f"transfers.workers ({self.workers})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(TrainedConfig):
    """A classifier trained on augmented images (random resized crop and flip)."""

    epochs: int = 100
    """Passes over the training split."""
    lr: float = 30.0
    """Learning rate of the classifier at this global batch size; it is not scaled."""
    schedule: Literal["step", "cosine"] = "step"
    """`step`: x0.1 at 60% and again at 80% of the epochs; `cosine`: half a cosine to 0.
    Both change once per epoch."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate grows linearly from 0."""
    weight_decay: float = 0.0
    """L2 penalty on all trained parameters."""
    size: int = 224
    """Side of an image given to the network, pixels."""
    resize: int = 256
    """Shorter side of a test image before its centre is cut out, pixels; at least `size`."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a training crop, as a share of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    """Reading of the training split."""

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
            f"transfers.stream.lanes is {self.stream.lanes}: it must divide "
            f"transfers.global_batch_size ({self.global_batch_size})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearClassifierConfig(ClassifierConfig):
    """The papers' linear protocol: a classifier on a frozen backbone, trained on augmented images.

    The backbone does not change by a single bit, BN statistics included. The defaults are those of
    MoCo v1 and v2 (He et al. 2020, arXiv:1911.05722, section 4.1). v3 has 90 epochs with `cosine`
    and lr 0.4 at a batch of 1024.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuneConfig(ClassifierConfig):
    """Fine-tuning: the whole network is trained, with BN synchronised over the workers."""

    epochs: int = 30
    """Passes over the training split."""
    lr: float = 0.1
    """Learning rate of the classifier at this global batch size; it is not scaled."""
    schedule: Literal["step", "cosine"] = "cosine"
    """`step`: x0.1 at 60% and again at 80% of the epochs; `cosine`: half a cosine to 0.
    Both change once per epoch."""
    weight_decay: float = 1e-4
    """L2 penalty on all trained parameters."""
    backbone_lr: float = 0.01
    """Learning rate of the backbone's last stage at this global batch size."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each stage of the backbone to the one before it, in (0, 1].
    1 trains all stages alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "fine_tune", "backbone_lr")
        require(
            0 < self.layer_decay <= 1,
            f"fine_tune.layer_decay is {self.layer_decay}: it must be in (0, 1]",
        )


AnyClassificationConfig = (
    KnnConfig  # frozen, cached features
    | LinearProbeConfig
    | LowShotConfig
    | LinearClassifierConfig  # trained in steps on augmented images
    | FineTuneConfig
)
"""Every transfer that needs class labels; a recipe's transfers are these and the detectors."""
