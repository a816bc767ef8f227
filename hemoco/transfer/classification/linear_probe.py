"""Linear probe on cached features (after He et al. 2020, section 4.1).

As in the paper: a frozen backbone in evaluation mode, pooled features without normalisation (hence
the large learning rate), SGD with momentum 0.9, and a classifier initialised from N(0, 0.01) with
zero bias. Departures: the features of the centre view are cached, so there is no augmentation; the
learning rate follows a cosine instead of steps; learning rate and weight decay are chosen on a
held-out fifth of the training split, never on the test split.

Shapes: M images, F features, C classes, H heads trained together (one per setting), B images of a
step.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hemoco.config import LinearProbeConfig
from hemoco.data.labelled import LabelledSplit
from hemoco.errors import ConfigError, TrainingError
from hemoco.features.cache import FeatureCache, split_features
from hemoco.models.resnet import Backbone
from hemoco.train.optim import cosine_lr
from hemoco.transfer.classification.low_shot import Standardisation, fit_logistic_regression
from hemoco.transfer.classification.scores import (
    check_labels,
    classification_result,
    count_predictions,
)
from hemoco.transfer.result import TransferResult

logger = logging.getLogger(__name__)

_MOMENTUM = 0.9
# Floor of a log-likelihood in the gradient. exp(-60) is 1e-26, too small to change a float32 sum.
_FLOOR = -60.0
_HELD_OUT = 5  # every fifth image is held out
_LOGITS_AT_ONCE = 2**24  # 67 MB; all logits of a grid on ImageNet's held-out fifth take 33 TB


class Setting(NamedTuple):
    """The hyperparameters of one head."""

    lr: float
    weight_decay: float


class Heads:
    """H independent linear classifiers, trained on the same batches with one setting each.

    Args:
        settings: one per head.
        classes: C.
        features: F.
        generator: CPU generator of the initial weights, which are the same for all heads.
    """

    def __init__(
        self, settings: Sequence[Setting], classes: int, features: int, generator: torch.Generator
    ) -> None:
        weight = torch.randn(classes, 1, features, generator=generator) * 0.01
        self.settings = tuple(settings)
        self.weight = weight.repeat(1, len(settings), 1)  # (C, H, F)
        self.bias = torch.zeros(classes, len(settings))  # (C, H)
        self._velocities = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self._lrs, self._decays = torch.tensor(self.settings).T.contiguous()  # (H,)

    def to(self, device: torch.device) -> "Heads":
        """Moves all tensors to a device and returns the object itself."""
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)
        self._velocities = [velocity.to(device) for velocity in self._velocities]
        self._lrs, self._decays = self._lrs.to(device), self._decays.to(device)
        return self

    def logits(self, features: Tensor) -> Tensor:
        """Logits of all heads by one matrix product: (B, F) -> (B, C, H)."""
        flat = torch.addmm(self.bias.flatten(), features, self.weight.flatten(0, 1).T)  # (B, C H)
        # The classes are not the last dimension: a softmax over ten contiguous numbers takes longer
        # than the matrix product.
        return flat.view(len(features), *self.bias.shape)  # (B, C, H)

    def step(self, features: Tensor, labels: Tensor, factor: float) -> Tensor:
        """One SGD step of all heads, equal to torch's SGD with momentum and weight decay.

        Args:
            features: (B, F).
            labels: (B,).
            factor: scales the learning rate of every head.

        Returns:
            Mean cross-entropy of each head before the step (H,).
        """
        log_likelihoods = self.logits(features).log_softmax(dim=1)  # (B, C, H)
        index = labels.view(-1, 1, 1).expand(-1, 1, len(self.settings))  # (B, 1, H)
        losses = -log_likelihoods.gather(1, index).mean(dim=0).squeeze(0)  # (H,)
        # The gradient with respect to the logits is (softmax - one-hot) / B; written out it is
        # faster than autograd. Without the floor, the softmax has denormal numbers, which make the
        # matrix product below several times slower.
        gradient = log_likelihoods.clamp_(min=_FLOOR).exp_()
        gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
        gradient = gradient.div_(len(features)).flatten(1)  # (B, C H)
        weight_velocity, bias_velocity = self._velocities
        # Momentum and gradient in one pass, since the weights do not fit a core's cache.
        weight_velocity.flatten(0, 1).addmm_(gradient.T, features, beta=_MOMENTUM)
        bias_velocity.mul_(_MOMENTUM).add_(gradient.sum(dim=0).view_as(bias_velocity))
        decays, lrs = self._decays, self._lrs * -factor
        weight_velocity.addcmul_(self.weight, decays[:, None])
        self.weight.addcmul_(weight_velocity, lrs[:, None])
        bias_velocity.addcmul_(self.bias, decays)
        self.bias.addcmul_(bias_velocity, lrs)
        return losses


class Evaluation(NamedTuple):
    """Loss and accuracy of each head."""

    losses: Tensor
    """Mean cross-entropy (H,)."""
    accuracies: Tensor
    """Fraction of images classified correctly (H,)."""


def run_linear_probe(
    config: LinearProbeConfig,
    backbone: Backbone,
    train: LabelledSplit,
    test: LabelledSplit,
    seed: int,
    cache: FeatureCache | None = None,
) -> TransferResult:
    """Measures the test accuracy of a linear classifier trained on the backbone's features.

    The history has train_loss, test_loss and top1 after each epoch, counted from 1. Further
    metrics: the setting chosen (`lr`, `weight_decay`), `held_out_top1` of it and of every setting
    tried, and `lbfgs_top1` if `config.lbfgs_check`.

    Args:
        config: epochs, batch size and the settings to try.
        backbone: not changed by a single bit.
        train: the split to fit on; first, every fifth image is held out to choose the setting.
        test: the split to evaluate; nothing is chosen on it.
        seed: seed of the held-out images, the initial weights and the order.
        cache: cache of features; None computes them.

    Raises:
        ShardError: see `check_labels`.
        ConfigError: fewer than 5 training images.
        TrainingError: the classifier diverges with every setting.
    """
    classes = check_labels(train, test)
    features, test_features = (split_features(backbone, split, cache) for split in (train, test))
    labels, test_labels = (split.labels.to(features.device) for split in (train, test))
    chosen, held_out_top1 = search_grid(config, classes, features, labels, seed)
    head = new_heads([chosen], classes, features, seed)
    history = []
    for epoch, train_loss in train_heads(head, features, labels, config, seed):
        losses, accuracies = evaluate_heads(head, test_features, test_labels)
        values = {"train_loss": train_loss, "test_loss": losses.item(), "top1": accuracies.item()}
        history.append((epoch, values))
    logits = head.logits(test_features).squeeze(2)  # (M, C)
    counts = count_predictions(logits, test_labels)
    also = {**chosen._asdict(), "held_out_top1": held_out_top1[chosen]}
    for (lr, decay), top1 in held_out_top1.items():
        also[f"held_out_top1/lr_{lr:g}_wd_{decay:g}"] = top1
    if config.lbfgs_check:
        also["lbfgs_top1"] = _lbfgs_top1(features, labels, test_features, test_labels)
    return classification_result(counts, train.classes, also=also, history=history)


def search_grid(
    config: LinearProbeConfig, classes: int, features: Tensor, labels: Tensor, seed: int
) -> tuple[Setting, dict[Setting, float]]:
    """Trains all settings on four fifths of the features and compares them on the held-out fifth.

    Args:
        config: epochs, batch size and the settings to try.
        classes: C.
        features: (M, F).
        labels: (M,), on the same device.
        seed: seed of the held-out images, the initial weights and the order.

    Returns:
        The best setting, and the held-out accuracy of every setting.

    Raises:
        ConfigError: fewer than 5 features.
        TrainingError: the classifier diverges with every setting.
    """
    fit, held_out = stratified_split(labels, seed)
    settings = [Setting(lr, decay) for lr in config.lrs for decay in config.weight_decays]
    heads = new_heads(settings, classes, features, seed)
    for _ in train_heads(heads, features[fit], labels[fit], config, seed):
        pass
    return _best_setting(heads, features[held_out], labels[held_out])


def new_heads(settings: Sequence[Setting], classes: int, features: Tensor, seed: int) -> Heads:
    """Untrained heads for features (M, F), on their device."""
    generator = torch.Generator().manual_seed(seed)
    return Heads(settings, classes, features.shape[1], generator).to(features.device)


def train_heads(
    heads: Heads, features: Tensor, labels: Tensor, config: LinearProbeConfig, seed: int
) -> Iterator[tuple[int, float]]:
    """Trains for `config.epochs` epochs and yields after each one.

    Args:
        heads: changed in place.
        features: (M, F), on the device of the heads.
        labels: (M,), on the same device.
        config: epochs and batch size; the settings are those of the heads.
        seed: seed of the order.

    Yields:
        The number of the epoch, from 1, and its mean training loss for the first head.
    """
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(config.epochs):
        factor = cosine_lr(epoch, config.epochs, 1.0)
        total = torch.zeros(len(heads.settings), device=features.device)
        order = torch.randperm(len(labels), generator=generator).to(features.device)
        for rows in torch.split(order, config.batch_size):
            total += heads.step(features[rows], labels[rows], factor) * len(rows)
        yield epoch + 1, (total[0] / len(labels)).item()


def evaluate_heads(heads: Heads, features: Tensor, labels: Tensor) -> Evaluation:
    """Evaluates all heads on features (M, F) with labels (M,).

    It works in parts of B rows, so memory does not grow with M.
    """
    count = len(heads.settings)
    losses, correct = torch.zeros(2, count, dtype=torch.float64, device=features.device)  # (H,)
    rows = max(1, _LOGITS_AT_ONCE // heads.bias.numel())
    for part, targets in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
        logits = heads.logits(part)  # (B, C, H)
        targets_by_head = targets[:, None].expand(-1, count)  # (B, H)
        losses += functional.cross_entropy(logits, targets_by_head, reduction="none").sum(dim=0)
        correct += (logits.argmax(dim=1) == targets_by_head).sum(dim=0)
    return Evaluation(losses / len(labels), correct / len(labels))


def stratified_split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the rows to hold out, a fifth of each class, from labels (M,).

    Returns:
        The rows to fit on and the rows held out.

    Raises:
        ConfigError: fewer than 5 labels.
    """
    if len(labels) < _HELD_OUT:
        raise ConfigError(
            f"linear_probe: train_split has {len(labels)} images: at least {_HELD_OUT} are needed, "
            "as a fifth is held out to choose the learning rate"
        )
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # In order of class, in each class shuffled: so every fifth row takes a fifth of each class.
    by_class = shuffled[labels.cpu()[shuffled].argsort(stable=True)]  # (M,)
    held_out = torch.arange(len(labels)) % _HELD_OUT == _HELD_OUT - 1
    return by_class[~held_out], by_class[held_out]


def _best_setting(
    heads: Heads, features: Tensor, labels: Tensor
) -> tuple[Setting, dict[Setting, float]]:
    """The best setting that did not diverge, and the accuracy of every setting.

    The best has the highest accuracy and, among equals, the lowest loss.
    """
    losses, accuracies = (values.tolist() for values in evaluate_heads(heads, features, labels))
    results = zip(accuracies, losses, heads.settings, strict=True)
    ranked = [(top1, -loss, setting) for top1, loss, setting in results if math.isfinite(loss)]
    lrs = sorted({setting.lr for setting in heads.settings})
    if not ranked:
        raise TrainingError(f"linear_probe.lrs {lrs}: all diverge; add lower learning rates")
    best = max(ranked)[2]
    if len(lrs) > 1 and best.lr in (lrs[0], lrs[-1]):
        logger.warning(
            "event=linear_probe_edge lr=%g tried=%s: the best learning rate is at the edge of the "
            "range tried; widen linear_probe.lrs",
            best.lr,
            lrs,
        )
    return best, dict(zip(heads.settings, accuracies, strict=True))


def _lbfgs_top1(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> float:
    """Test accuracy of a logistic regression on standardised features, fitted by L-BFGS.

    The penalty is that of scikit-learn's default, C = 1.
    """
    scale = Standardisation.of(features)
    classes = int(labels.max()) + 1
    weight, bias = fit_logistic_regression(
        scale(features), labels, classes, weight_decay=1 / len(labels)
    )
    predictions = (scale(test_features) @ weight.T + bias).argmax(dim=1)
    return (predictions == test_labels).double().mean().item()
