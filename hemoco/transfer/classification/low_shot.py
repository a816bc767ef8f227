"""Low-shot classification: logistic regression on frozen features of a few images per class.

Features are standardised with the mean and deviation over all training images, so that one penalty
suits backbones with different feature scales. This uses no labels.

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
_ROWS = 65536  # rows converted to float64 at a time when only their sum is needed


class Standardisation(NamedTuple):
    """Per-feature shift and scale; call it to apply them, in float64."""

    mean: Tensor
    """float64 (F,)."""
    deviation: Tensor
    """float64 (F,), > 0."""

    @classmethod
    def of(cls, features: Tensor) -> "Standardisation":
        """The standardisation that gives features (M, F) mean 0 and deviation 1."""
        parts = torch.split(features, _ROWS)
        mean = torch.zeros_like(features[0], dtype=torch.float64)  # (F,)
        for part in parts:
            mean += part.double().sum(dim=0)
        mean /= len(features)
        squares = [(part.double() - mean).square().sum(dim=0) for part in parts]
        deviation = (torch.stack(squares).sum(dim=0) / len(features)).sqrt()  # (F,)
        # A feature that is constant in training keeps its scale: divided by almost 0 it would
        # outweigh all others in a test image where it is not constant.
        return cls(mean, torch.where(deviation > 1e-6, deviation, 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        """Standardises features: (M, F) -> float64 (M, F)."""
        return (features.double() - self.mean) / self.deviation


def run_low_shot(
    config: LowShotConfig,
    backbone: Backbone,
    train: LabelledSplit,
    test: LabelledSplit,
    seed: int,
    cache: FeatureCache | None = None,
) -> TransferResult:
    """Measures the mean test accuracy over several draws of a few training images per class.

    Accuracies are means over the draws; the files count the predictions of all draws together. With
    two draws or more, `std` is the standard deviation of top1 and `ci95` half the 95% confidence
    interval of its mean by Student's t. `labelled_images` is n.

    Args:
        config: images per class, draws and penalty.
        backbone: not changed by a single bit.
        train: the split from which images are drawn.
        test: evaluated whole for each draw.
        seed: seed of the draws; two backbones measured with one seed get the same images.
        cache: cache of features; None computes them.

    Raises:
        ShardError: see `check_labels`.
        ConfigError: a class has fewer images than are to be drawn.
    """
    classes = check_labels(train, test)
    counts_by_class = count_shots(train, config)
    features, test_features = (split_features(backbone, split, cache) for split in (train, test))
    scale = Standardisation.of(features)
    labels, test_labels = (split.labels.to(features.device) for split in (train, test))
    test_features = scale(test_features)
    generator = torch.Generator().manual_seed(seed)
    counts_by_draw = []
    for _ in range(config.draws):
        rows = draw_shots(train.labels, counts_by_class, generator).to(features.device)
        weight, bias = fit_logistic_regression(
            scale(features[rows]), labels[rows], classes, config.weight_decay
        )
        logits = test_features @ weight.T + bias  # (M, C)
        counts_by_draw.append(count_predictions(logits, test_labels))
    also = {"labelled_images": float(sum(counts_by_class))}
    if config.draws > 1:
        top1 = [class_metrics(counts)["top1"] for counts in counts_by_draw]
        also |= {"std": statistics.stdev(top1), "ci95": confidence_half_width(top1)}
    return classification_result(sum_counts(counts_by_draw), train.classes, also=also)


def count_shots(train: LabelledSplit, config: LowShotConfig) -> list[int]:
    """The number of images to draw from each class, by label.

    It is `fraction` of the class's images but at least one, or `shots`; 0 for a class without
    images.

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
        others = f", and {len(few) - 1} more classes have too few" if len(few) > 1 else ""
        raise ConfigError(
            f"low_shot.shots is {config.shots}: class {least}{name} has {counts[least]} images in "
            f"train_split{others}; set low_shot.shots to at most {counts[least]} or give the class "
            "more images"
        )
    return [config.shots if count else 0 for count in counts]


def draw_shots(
    labels: Tensor, counts_by_class: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Draws rows (n,) of distinct images, `counts_by_class` from each class, in order of class."""
    drawn = []
    for label, count in enumerate(counts_by_class):
        rows = (labels.cpu() == label).nonzero().squeeze(1)
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(drawn)  # (n,)


def fit_logistic_regression(
    features: Tensor, labels: Tensor, classes: int, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """Minimises mean cross-entropy + weight_decay / 2 * |weight|^2 by L-BFGS.

    Args:
        features: float64 (M, F).
        labels: (M,).
        classes: C.
        weight_decay: > 0; with 0 there is no minimum when the classes are separable.

    Returns:
        Weight (C, F) and bias (C,).
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
        entropy = functional.cross_entropy(features @ weight.T + bias, labels)
        value = entropy + weight_decay / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
