"""Low-shot classification: logistic regression on frozen features of a few labelled images per class.

Features are standardised by the mean and deviation of all training images, which takes no labels, so that one penalty
suits backbones of different feature scales.

Shapes: M images, F features, C classes, n images drawn per class.
"""

import math
import statistics

import torch
from torch import Tensor
from torch.nn import functional

from hemoco.config import LowShotConfig
from hemoco.encoder import Backbone
from hemoco.errors import ConfigError
from hemoco.knn import extract_features
from hemoco.transfer.frozen import accuracies, count_classes
from hemoco.transfer.result import LabelledImages, TransferResult

_MAX_ITERATIONS = 500


def run_low_shot(
    config: LowShotConfig, backbone: Backbone, train: LabelledImages, test: LabelledImages, seed: int
) -> TransferResult:
    """Mean test accuracy over several draws of n training images per class.

    Metrics: `top1` and `per_class_accuracy` are means over the draws; with two draws or more, `std` is the deviation
    of top1 between draws and `ci95` half the width of its mean's normal 95% confidence interval.

    Args:
        config: images per class, draws and penalty.
        backbone: stays bit for bit as it is.
        train: images are drawn from it.
        test: evaluated whole at each draw.
        seed: of the draws; backbones compared at the same seed see the same images.

    Raises:
        ConfigError: a class has fewer images than are to be drawn.
    """
    features, test_features = _standardised(*(extract_features(backbone, s.images) for s in (train, test)))
    labels, test_labels = train.labels.to(features.device), test.labels.to(features.device)
    classes = count_classes(train, test)
    generator = torch.Generator().manual_seed(seed)
    measured = []
    for _ in range(config.draws):
        rows = draw_shots(train.labels, classes, config.shots, generator).to(features.device)
        weight, bias = fit_logistic_regression(features[rows], labels[rows], classes, config.weight_decay)
        measured.append(accuracies((test_features @ weight.T + bias).argmax(dim=1), test_labels))
    metrics = {name: statistics.fmean(values[name] for values in measured) for name in measured[0]}
    if config.draws > 1:
        metrics["std"] = statistics.stdev(values["top1"] for values in measured)
        metrics["ci95"] = 1.96 * metrics["std"] / math.sqrt(config.draws)
    return TransferResult(metric="top1", value=metrics["top1"], metrics=metrics)


def draw_shots(labels: Tensor, classes: int, shots: int, generator: torch.Generator) -> Tensor:
    """Rows (C * n,) of `shots` different images of each class, class 0 first.

    Raises:
        ConfigError: a class has fewer images.
    """
    drawn = []
    for label in range(classes):
        rows = (labels.cpu() == label).nonzero().squeeze(1)
        if len(rows) < shots:
            raise ConfigError(
                f"low_shot.shots is {shots}: class {label} has {len(rows)} images in train_split; "
                f"set low_shot.shots to at most {len(rows)} or give the class more images"
            )
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:shots]])
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
        value = functional.cross_entropy(features @ weight.T + bias, labels) + weight_decay / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, by the training features' mean and deviation."""
    train, test = train.double(), test.double()
    deviation = train.std(dim=0, correction=0)
    # a unit that is dead in training would otherwise rule wherever it is alive in test
    deviation = torch.where(deviation > 1e-6, deviation, 1.0)
    mean = train.mean(dim=0)
    return (train - mean) / deviation, (test - mean) / deviation
