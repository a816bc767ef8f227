"""The training and evaluation of a classifier.

As in `hemoco.train`, the loop is a generator that yields after each optimiser step, at which the state is a consistent
checkpoint; it runs alike in one process and on many ranks.

Shapes: N images on this rank, M of a split, B of an evaluation batch, C classes, S x S pixels.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hemoco.data.labelled import labelled_views
from hemoco.data.shards.index import Shard
from hemoco.data.stream.batches import Batch
from hemoco.data.transforms import augment, draw_augmentation
from hemoco.distributed import (
    compute_on_all,
    gather_objects,
    mean_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from hemoco.errors import ShardError, TrainingError
from hemoco.train.state import LoggedStep
from hemoco.transfer.classification.classifier import (
    ClassifierState,
    classifier_lr_factor,
    classifier_views,
)


class Scores(NamedTuple):
    """Of M images."""

    logits: Tensor
    """float32 (M, C), on the CPU."""
    labels: Tensor
    """int64 (M,)."""


def classifier_steps(
    state: ClassifierState, batches: Iterable[Batch], steps_per_epoch: int
) -> Iterator[LoggedStep]:
    """Trains on the batches, one optimiser step each, and yields after every step.

    Raises:
        ShardError: an image has no label, or one that is no class.
        TrainingError: the loss is not finite; raised on all ranks before the optimiser step.
    """
    config = state.config
    total = config.epochs * steps_per_epoch
    for batch in batches:
        factor = classifier_lr_factor(config, step=state.step, steps_per_epoch=steps_per_epoch)
        for group in state.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        loss, right = _optimise(state, batch)
        state.step += 1
        state.position = batch.position
        logged = state.step == total or state.step % config.log_every_steps == 0
        values = (
            {"train_loss": loss, "train_top1": right, "lr": config.lr * factor} if logged else {}
        )
        yield LoggedStep(state.step, values)


@torch.no_grad()
def classify(
    state: ClassifierState, data_url: str, shards: Sequence[Shard], batch_size: int = 256
) -> Scores:
    """Scores of all images of some shards; each rank computes some shards, and all get all.

    Raises:
        ShardError: an image has no label or cannot be decoded; on all ranks.
    """
    state.model.eval()
    mine = shards[rank() :: world_size()]
    parts = compute_on_all(lambda: _scores(state, data_url, mine, batch_size))
    return Scores(
        torch.cat([part.logits for part in parts]), torch.cat([part.labels for part in parts])
    )


def _scores(
    state: ClassifierState, data_url: str, shards: Sequence[Shard], batch_size: int
) -> Scores:
    config, model = state.config, state.model
    views = labelled_views(data_url, shards, size=config.size, shorter=config.resize)
    scores, labels = [torch.empty(0, model.head.out_features)], []
    while some := list(itertools.islice(views, batch_size)):
        images = torch.stack([view.image for view in some])  # (B, 3, S, S)
        scores.append(model(model.backbone.normalise(images)).cpu())
        labels += [view.label for view in some]
    return Scores(torch.cat(scores), torch.tensor(labels, dtype=torch.int64))


def _optimise(state: ClassifierState, batch: Batch) -> tuple[float, float]:
    """One step; loss and accuracy of the batch before it, over all ranks."""
    model = state.model
    device = model.head.weight.device
    images, labels = _augmented(batch, state), _labels(batch, model.head.out_features, device)
    model.train()
    logits = state.forward(images)  # (N, C)
    loss = functional.cross_entropy(logits, labels)
    right = (logits.detach().argmax(dim=1) == labels).float().mean()
    value, accuracy = mean_over_ranks(torch.stack([loss.detach(), right])).tolist()
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss is {value} at step {state.step + 1}: lower the transfer's lr or add warmup_epochs"
        )
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    return value, accuracy


def _augmented(batch: Batch, state: ClassifierState) -> Tensor:
    """The batch's crops flipped and normalised, float32 (N, 3, S, S)."""
    count, (epoch, step) = len(batch.crops), batch.position
    config, backbone = state.config, state.model.backbone
    views = dataclasses.replace(classifier_views(config), mean=backbone.mean, std=backbone.std)
    slots = (rank() * count, (rank() + 1) * count)
    draws = draw_augmentation(views, seed=state.seed, epoch=epoch, step=step, slots=slots, view=0)
    return augment(batch.crops[:, 0], draws, views)


def _labels(batch: Batch, classes: int, device: torch.device) -> Tensor:
    """Labels (N,) on the device."""
    labels = torch.tensor(batch.labels, dtype=torch.int64)
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    # over the ranks: all of them must stop
    if sum_over_ranks(torch.tensor(len(wrong), device=device)).item():
        named = [
            f"sample {batch.keys[place]} has the label {batch.labels[place]}" for place in wrong[:1]
        ]
        first = next(iter(itertools.chain(*gather_objects(named))))
        raise ShardError(
            f"{first}: 0 to {classes - 1} are classes; pack class folders, or name a labelled split"
        )
    return labels.to(device)
