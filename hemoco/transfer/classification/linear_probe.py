"""Linear probe on cached features (after He et al. 2020, section 4.1).

From the paper: frozen backbone in evaluation mode, pooled features as they are (not normalised, so the learning rate
is large), SGD with momentum 0.9, classifier N(0, 0.01) with zero bias. Departures: features of the centre view are
cached, so there is no augmentation; cosine instead of step decay; learning rate and weight decay are chosen on a
held-out fifth of the training split, never on the test split.

Shapes: M images, F features, C classes, H heads trained side by side, one per setting, B features of a step.
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
_FLOOR = -60.0  # of a log-likelihood in the gradient: 1e-26, which no float32 sum beside it notices
_HELD_OUT = 5  # every fifth image
_LOGITS_AT_ONCE = 2**24  # 67 MB; those of a grid on ImageNet's held-out fifth would take 33 TB


class Setting(NamedTuple):
    """What tells a head from the others."""

    lr: float
    weight_decay: float


class Heads:
    """H independent linear classifiers that see the same batches, each trained with its own setting.

    Args:
        settings: one per head.
        classes: C.
        features: F.
        generator: of the initial weights, on the CPU; all heads start alike.
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
        """Moves everything to a device; itself."""
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)
        self._velocities = [velocity.to(device) for velocity in self._velocities]
        self._lrs, self._decays = self._lrs.to(device), self._decays.to(device)
        return self

    def logits(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, C, H); one product of matrices for all heads."""
        flat = torch.addmm(self.bias.flatten(), features, self.weight.flatten(0, 1).T)  # (B, C H)
        # the classes not last: softmax over ten numbers that lie side by side would take longer than the product
        return flat.view(len(features), *self.bias.shape)

    def step(self, features: Tensor, labels: Tensor, factor: float) -> Tensor:
        """One step of torch's SGD for each head, at `factor` times its learning rate; the losses before it (H,)."""
        likelihoods = self.logits(features).log_softmax(dim=1)  # (B, C, H), logarithms
        own = labels.view(-1, 1, 1).expand(-1, 1, len(self.settings))  # (B, 1, H)
        losses = -likelihoods.gather(1, own).mean(dim=0).squeeze(0)
        # the gradient of cross-entropy in closed form, which is faster than autograd's; without the floor, denormal
        # numbers would make the product below take several times as long
        slopes = likelihoods.clamp_(min=_FLOOR).exp_()
        slopes.scatter_add_(1, own, slopes.new_full(own.shape, -1.0))
        slopes = slopes.div_(len(features)).flatten(1)  # (B, C H)
        of_weight, of_bias = self._velocities
        # momentum and gradient in one pass over the weights, which are more than a core's caches hold
        of_weight.flatten(0, 1).addmm_(slopes.T, features, beta=_MOMENTUM)
        of_bias.mul_(_MOMENTUM).add_(slopes.sum(dim=0).view_as(of_bias))
        for parameter, velocity in ((self.weight, of_weight), (self.bias, of_bias)):
            shape = [-1, *[1] * (parameter.ndim - 2)]  # of a number for each head
            velocity.addcmul_(parameter, self._decays.view(shape))
            parameter.addcmul_(velocity, (self._lrs * -factor).view(shape))
        return losses


class Evaluation(NamedTuple):
    """Of each head."""

    losses: Tensor
    """Mean cross-entropy (H,)."""
    accuracies: Tensor
    """(H,)."""


def run_linear_probe(
    config: LinearProbeConfig,
    backbone: Backbone,
    train: LabelledSplit,
    test: LabelledSplit,
    seed: int,
    cache: FeatureCache | None = None,
) -> TransferResult:
    """Test accuracy after the last epoch of a linear classifier trained on the backbone's features.

    The history has train_loss, test_loss and top1 after each epoch, counted from 1. Further metrics: the setting chosen
    (`lr`, `weight_decay`), its `held_out_top1`, and `lbfgs_top1` where the check is wanted.

    Args:
        config: epochs, batch size and the settings tried.
        backbone: stays bit for bit as it is.
        train: fits the classifier; every fifth image of a class chooses the setting first.
        test: evaluated, nothing is chosen on it.
        seed: of the split, the initial weights and the order.
        cache: of features; None: they are computed.

    Raises:
        ShardError: as `check_labels`.
        ConfigError: fewer than 5 training images.
        TrainingError: the classifier diverges with every setting.
    """
    classes = check_labels(train, test)
    features, test_features = (split_features(backbone, split, cache) for split in (train, test))
    labels, test_labels = (split.labels.to(features.device) for split in (train, test))
    chosen, sweep = search_grid(config, classes, features, labels, seed)
    head, history = new_heads([chosen], classes, features, seed), []
    for epoch, train_loss in train_heads(head, features, labels, config, seed):
        losses, accuracies = evaluate_heads(head, test_features, test_labels)
        values = {"train_loss": train_loss, "test_loss": losses.item(), "top1": accuracies.item()}
        history.append((epoch, values))
    counts = count_predictions(head.logits(test_features).squeeze(2), test_labels)
    also = {**chosen._asdict(), "held_out_top1": sweep[chosen]}
    also |= {f"held_out_top1/lr_{lr:g}_wd_{decay:g}": top1 for (lr, decay), top1 in sweep.items()}
    if config.lbfgs_check:
        also["lbfgs_top1"] = _lbfgs_top1(features, labels, test_features, test_labels)
    return classification_result(counts, train.classes, also=also, history=history)


def search_grid(
    config: LinearProbeConfig, classes: int, features: Tensor, labels: Tensor, seed: int
) -> tuple[Setting, dict[Setting, float]]:
    """The best setting on a held-out fifth of features (M, F) with labels (M,), and the accuracy of each there.

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
    return Heads(settings, classes, features.shape[1], torch.Generator().manual_seed(seed)).to(
        features.device
    )


def train_heads(
    heads: Heads, features: Tensor, labels: Tensor, config: LinearProbeConfig, seed: int
) -> Iterator[tuple[int, float]]:
    """Trains in `config.epochs` passes, and yields after each its number, from 1, and the first head's mean loss.

    Args:
        heads: changed in place.
        features: (M, F), on the device of the heads.
        labels: (M,), there too.
        config: epochs and batch size; the settings are those of the heads.
        seed: of the order.
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
    """All heads on features (M, F) with labels (M,), of any number: the logits of some at a time are held."""
    losses, right = torch.zeros(2, len(heads.settings), dtype=torch.float64, device=features.device)
    rows = max(1, _LOGITS_AT_ONCE // heads.bias.numel())
    for part, own in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
        logits = heads.logits(part)  # (B, C, H)
        every = own[:, None].expand(-1, len(heads.settings))  # (B, H)
        losses += functional.cross_entropy(logits, every, reduction="none").sum(dim=0)
        right += (logits.argmax(dim=1) == every).sum(dim=0)
    return Evaluation(losses / len(labels), right / len(labels))


def stratified_split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and every fifth row held out, each class in proportion.

    Raises:
        ConfigError: fewer than 5 labels.
    """
    if len(labels) < _HELD_OUT:
        raise ConfigError(
            f"linear_probe: train_split has {len(labels)} images: at least {_HELD_OUT} are needed, "
            "as a fifth is held out to choose the learning rate"
        )
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels.cpu()[shuffled].argsort(stable=True)]
    held_out = torch.arange(len(labels)) % _HELD_OUT == _HELD_OUT - 1
    return by_class[~held_out], by_class[held_out]


def _best_setting(
    heads: Heads, features: Tensor, labels: Tensor
) -> tuple[Setting, dict[Setting, float]]:
    """The most accurate setting that did not diverge, of equals that of lower loss; and the accuracy of each."""
    losses, accuracies = (values.tolist() for values in evaluate_heads(heads, features, labels))
    every = zip(accuracies, losses, heads.settings, strict=True)
    found = [(top1, -loss, setting) for top1, loss, setting in every if math.isfinite(loss)]
    if not found:
        tried = sorted({setting.lr for setting in heads.settings})
        raise TrainingError(f"linear_probe.lrs {tried}: all diverge; add lower learning rates")
    setting = max(found)[2]
    lrs = sorted({each.lr for each in heads.settings})
    if len(lrs) > 1 and setting.lr in (lrs[0], lrs[-1]):
        logger.warning(
            "event=linear_probe_edge lr=%g tried=%s: the best is at the edge of what was tried; widen linear_probe.lrs",
            *(setting.lr, lrs),
        )
    return setting, dict(zip(heads.settings, accuracies, strict=True))


def _lbfgs_top1(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> float:
    """Accuracy of a logistic regression on standardised features, with the penalty of scikit-learn's default C = 1."""
    scale = Standardisation.of(features)
    classes = int(labels.max()) + 1
    weight, bias = fit_logistic_regression(
        scale(features), labels, classes, weight_decay=1 / len(labels)
    )
    predictions = (scale(test_features) @ weight.T + bias).argmax(dim=1)
    return (predictions == test_labels).double().mean().item()
