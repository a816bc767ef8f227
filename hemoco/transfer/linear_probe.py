"""Linear probe on cached features (after He et al. 2020, section 4.1).

From the paper: frozen backbone in evaluation mode, pooled features as they are (not normalised, so the learning rate
is large), SGD with momentum 0.9, no weight decay, classifier N(0, 0.01) with zero bias. Departures: features of the
centre view are cached, so there is no augmentation; cosine instead of step decay; the learning rate is chosen on a
held-out fifth of the training split, never on the test split.

Shapes: M images, F features, C classes, H heads trained side by side, one per learning rate, B features of a step.
"""

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from hemoco.config import LinearProbeConfig
from hemoco.encoder import Backbone
from hemoco.errors import ConfigError, TrainingError
from hemoco.knn import extract_features
from hemoco.transfer.frozen import accuracies, count_classes
from hemoco.transfer.result import LabelledImages, TransferResult

logger = logging.getLogger(__name__)

_MOMENTUM = 0.9
_HELD_OUT = 5  # every fifth image


class Heads:
    """H independent linear classifiers (H, C, F) and (H, C) that see the same batches, each with its own lr."""

    def __init__(self, lrs: tuple[float, ...], classes: int, features: int, generator: torch.Generator) -> None:
        weight = torch.randn(classes, features, generator=generator) * 0.01
        self.lrs = torch.tensor(lrs)
        self.weight = weight.repeat(len(lrs), 1, 1)  # (H, C, F), all start alike
        self.bias = torch.zeros(len(lrs), classes)
        self.velocities = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def to(self, device: torch.device) -> "Heads":
        """Moves everything to a device; itself."""
        self.lrs, self.weight, self.bias = (t.to(device) for t in (self.lrs, self.weight, self.bias))
        self.velocities = [velocity.to(device) for velocity in self.velocities]
        return self

    def logits(self, features: Tensor) -> Tensor:
        """(B, F) -> (H, B, C)."""
        return torch.baddbmm(self.bias[:, None], features.expand(len(self.lrs), -1, -1), self.weight.mT)

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of each head (H,)."""
        logits = self.logits(features)  # (H, B, C)
        every = functional.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
        return every.view(len(logits), -1).mean(dim=1)

    def step(self, features: Tensor, labels: Tensor, decay: float) -> Tensor:
        """One SGD step of each head at `decay` times its learning rate; the losses before it (H,)."""
        parameters = [self.weight.requires_grad_(), self.bias.requires_grad_()]
        losses = self.losses(features, labels)
        gradients = torch.autograd.grad(losses.sum(), parameters)  # the sum: no head sees another's loss
        with torch.no_grad():
            for parameter, gradient, velocity in zip(parameters, gradients, self.velocities, strict=True):
                velocity.mul_(_MOMENTUM).add_(gradient)
                parameter.sub_(velocity * (self.lrs * decay).view(-1, *[1] * (parameter.ndim - 1)))
        return losses.detach()


def run_linear_probe(
    config: LinearProbeConfig, backbone: Backbone, train: LabelledImages, test: LabelledImages, seed: int
) -> TransferResult:
    """Test accuracy after the last epoch of a linear classifier trained on the backbone's features.

    The history has train_loss, test_loss and top1 after each epoch, counted from 1.

    Args:
        config: epochs, batch size and the learning rates tried.
        backbone: stays bit for bit as it is.
        train: fits the classifier; every fifth image of a class chooses the learning rate first.
        test: evaluated, nothing is chosen on it.
        seed: of the split, the initial weights and the order.

    Raises:
        ConfigError: fewer than 5 training images.
        TrainingError: the classifier diverges with every learning rate.
    """
    features, test_features = (extract_features(backbone, split.images) for split in (train, test))
    labels, test_labels = train.labels.to(features.device), test.labels.to(features.device)
    classes = count_classes(train, test)
    fit, held_out = stratified_split(train.labels, seed)
    heads = _new_heads(config.lrs, classes, features, seed)
    for _ in _epochs(heads, features[fit], labels[fit], config, seed):
        pass
    chosen, held_out_top1 = _best_head(heads, features[held_out], labels[held_out])

    head = _new_heads((config.lrs[chosen],), classes, features, seed)
    history = [
        (epoch, {"train_loss": loss, **_evaluate(head, test_features, test_labels)})
        for epoch, loss in _epochs(head, features, labels, config, seed)
    ]
    metrics = accuracies(_predict(head, test_features), test_labels)
    metrics |= {"lr": config.lrs[chosen], "held_out_top1": held_out_top1}
    return TransferResult(metric="top1", value=metrics["top1"], metrics=metrics, history=history)


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


def _new_heads(lrs: tuple[float, ...], classes: int, features: Tensor, seed: int) -> Heads:
    return Heads(lrs, classes, features.shape[1], torch.Generator().manual_seed(seed)).to(features.device)


def _epochs(
    heads: Heads, features: Tensor, labels: Tensor, config: LinearProbeConfig, seed: int
) -> Iterator[tuple[int, float]]:
    """Trains, and yields after each epoch its number, from 1, and the mean training loss of the first head."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(config.epochs):
        decay = 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
        total = torch.zeros(len(heads.lrs), device=features.device)
        order = torch.randperm(len(labels), generator=generator).to(features.device)
        for rows in torch.split(order, config.batch_size):
            total += heads.step(features[rows], labels[rows], decay) * len(rows)
        yield epoch + 1, (total[0] / len(labels)).item()


@torch.no_grad()
def _evaluate(head: Heads, features: Tensor, labels: Tensor) -> dict[str, float]:
    top1 = accuracies(_predict(head, features), labels)["top1"]
    return {"test_loss": head.losses(features, labels)[0].item(), "top1": top1}


@torch.no_grad()
def _predict(head: Heads, features: Tensor) -> Tensor:
    return head.logits(features)[0].argmax(dim=1)


@torch.no_grad()
def _best_head(heads: Heads, features: Tensor, labels: Tensor) -> tuple[int, float]:
    """The most accurate head that did not diverge, between equals the one of lower loss; and its accuracy."""
    losses = heads.losses(features, labels)  # (H,)
    right = (heads.logits(features).argmax(dim=2) == labels).float().mean(dim=1)  # (H,)
    for lr, accuracy, loss in zip(heads.lrs.tolist(), right.tolist(), losses.tolist(), strict=True):
        logger.info("event=linear_probe_lr lr=%g held_out_top1=%.4f loss=%.4f", lr, accuracy, loss)
    usable = [head for head in range(len(losses)) if losses[head].isfinite()]
    if not usable:
        raise TrainingError(f"linear_probe.lrs {tuple(heads.lrs.tolist())}: all diverge; add lower learning rates")
    best = max(usable, key=lambda head: (right[head].item(), -losses[head].item()))
    return best, right[best].item()
