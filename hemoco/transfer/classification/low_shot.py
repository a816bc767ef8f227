"""Low-shot classification: logistic regression on frozen features of a few labelled images per class.

Features are standardised by the mean and deviation of all training images, which takes no labels, so that one penalty
suits backbones of different feature scales.

Shapes: M images, F features, C classes, n images drawn.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hemoco.config import LowShotConfig
from hemoco.data.labelled import LabelledSplit
from hemoco.errors import ConfigError
from hemoco.features.cache import FeatureCache, split_features
from hemoco.intervals import confidence_half_width
from hemoco.models.resnet import Backbone
from hemoco.transfer.classification.scores import (
    check_labels,
    class_metrics,
    classification_result,
    count_predictions,
    sum_counts,
)
from hemoco.transfer.result import TransferResult

_MAX_ITERATIONS = 500
_ROWS = 65536  # standardised at a time where all are needed only for their mean


class Standardisation(NamedTuple):
    """Shifts and scales each feature; calling it does so, in float64."""

    mean: Tensor
    """float64 (F,)."""
    deviation: Tensor
    """float64 (F,), > 0."""

    @classmethod
    def of(cls, features: Tensor) -> "Standardisation":
        """That which gives features (M, F) mean 0 and deviation 1."""
        parts = torch.split(features, _ROWS)
        mean = sum(
            (part.double().sum(dim=0) for part in parts),
            start=torch.zeros_like(features[0]).double(),
        )
        mean /= len(features)
        squares = torch.stack([(part.double() - mean).square().sum(dim=0) for part in parts]).sum(
            dim=0
        )
        deviation = (squares / len(features)).sqrt()
        # a unit that is dead in training would otherwise rule wherever it is alive in test
        return cls(mean, torch.where(deviation > 1e-6, deviation, 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        """(M, F) -> (M, F)."""
        return (features.double() - self.mean) / self.deviation


def run_low_shot(
    config: LowShotConfig,
    backbone: Backbone,
    train: LabelledSplit,
    test: LabelledSplit,
    seed: int,
    cache: FeatureCache | None = None,
) -> TransferResult:
    """Mean test accuracy over several draws of a few training images per class.

    Accuracies are means over the draws, files count the predictions of all. With two draws or more, `std` is the
    deviation of top1 and `ci95` half of its mean's 95% confidence interval by Student's t; `labelled_images` is n.

    Args:
        config: images per class, draws and penalty.
        backbone: stays bit for bit as it is.
        train: images are drawn from it.
        test: evaluated whole, each time.
        seed: of the draws; backbones compared at the same seed see the same images.
        cache: of features; None: they are computed.

    Raises:
        ShardError: as `check_labels`.
        ConfigError: a class has fewer images than are to be drawn.
    """
    classes = check_labels(train, test)
    counts_by_class = count_shots(train, config)
    features, test_features = (split_features(backbone, split, cache) for split in (train, test))
    scale = Standardisation.of(features)
    labels, test_labels = (split.labels.to(features.device) for split in (train, test))
    test_features = scale(test_features)
    generator = torch.Generator().manual_seed(seed)
    measured = []
    for _ in range(config.draws):
        rows = draw_shots(train.labels, counts_by_class, generator).to(features.device)
        weight, bias = fit_logistic_regression(
            scale(features[rows]), labels[rows], classes, config.weight_decay
        )
        measured.append(count_predictions(test_features @ weight.T + bias, test_labels))
    spread = _spread([class_metrics(counts)["top1"] for counts in measured])
    also = {"labelled_images": float(sum(counts_by_class)), **spread}
    return classification_result(sum_counts(measured), train.classes, also=also)


def count_shots(train: LabelledSplit, config: LowShotConfig) -> list[int]:
    """Images drawn of each class (C,): `fraction` of its images but at least one, or `shots`; none where it has none.

    Raises:
        ConfigError: a class has fewer images than `shots`.
    """
    counts: list[int] = train.labels.cpu().bincount().tolist()
    if config.fraction:
        return [max(1, round(config.fraction * count)) if count else 0 for count in counts]
    few = [label for label, count in enumerate(counts) if 0 < count < config.shots]
    if few:
        least = min(few, key=lambda label: counts[label])
        name = f" ({train.classes[least]})" if least < len(train.classes) else ""
        raise ConfigError(
            f"low_shot.shots is {config.shots}: class {least}{name} has {counts[least]} images in train_split"
            f"{f', and {len(few) - 1} more classes have too few' if few[1:] else ''}; set low_shot.shots to at most "
            f"{counts[least]} or give the class more images"
        )
    return [config.shots if count else 0 for count in counts]


def draw_shots(
    labels: Tensor, counts_by_class: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Rows (n,) of different images, so many of each class, class 0 first."""
    drawn = []
    for label, count in enumerate(counts_by_class):
        rows = (labels.cpu() == label).nonzero().squeeze(1)
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(drawn)


def fit_logistic_regression(
    features: Tensor, labels: Tensor, classes: int, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """Weight (C, F) and bias (C,) that minimise mean cross-entropy + weight_decay / 2 * |weight|^2.

    Args:
        features: float64 (M, F).
        labels: (M,).
        classes: C.
        weight_decay: > 0, for the minimum to exist where classes are separable.
    """
    weight = features.new_zeros(classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = (
            functional.cross_entropy(features @ weight.T + bias, labels)
            + weight_decay / 2 * weight.square().sum()
        )
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Deviation of the draws, and half the confidence interval of their mean; nothing of a single draw."""
    if len(values) < 2:
        return {}
    return {"std": statistics.stdev(values), "ci95": confidence_half_width(values)}
