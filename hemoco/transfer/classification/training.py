"""Training and evaluation of a classifier.

As in `hemoco.train`, the loop is a generator that yields after each optimiser step. At a yield the
state is a consistent checkpoint. The same loop runs in one process and on many ranks.

Shapes: N images of a step on this rank, M images of a split, B images of an evaluation batch,
C classes, S x S pixels.
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
    """Scores and labels of M images."""

    logits: Tensor
    """float32 (M, C), on the CPU."""
    labels: Tensor
    """int64 (M,)."""


def classifier_steps(
    state: ClassifierState, batches: Iterable[Batch], steps_per_epoch: int
) -> Iterator[LoggedStep]:
    """Trains with one optimiser step per batch and yields after every step.

    Raises:
        ShardError: an image has no label, or a label outside 0 to C - 1; raised on all ranks.
        TrainingError: the loss is not finite; raised on all ranks before the optimiser step.
    """
    config = state.config
    total = config.epochs * steps_per_epoch
    for batch in batches:
        factor = classifier_lr_factor(config, step=state.step, steps_per_epoch=steps_per_epoch)
        for group in state.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        loss, accuracy = _optimise(state, batch)
        state.step += 1
        state.position = batch.position
        values: dict[str, float] = {}
        if state.step == total or state.step % config.log_every_steps == 0:
            values = {"train_loss": loss, "train_top1": accuracy, "lr": config.lr * factor}
        yield LoggedStep(state.step, values)


@torch.no_grad()
def classify(
    state: ClassifierState, data_url: str, shards: Sequence[Shard], batch_size: int = 256
) -> Scores:
    """Computes the scores of all images of the shards; returns them all on every rank.

    Every rank must call it, and computes every world_size-th shard.

    Args:
        state: its model is left in evaluation mode.
        data_url: URL of the shard folder.
        shards: shards of that folder.
        batch_size: B.

    Raises:
        ShardError: an image has no label or cannot be decoded; raised on all ranks.
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
    logits = [torch.empty(0, model.head.out_features)]  # with no shards, torch.cat needs a tensor
    labels: list[int] = []
    while batch := list(itertools.islice(views, batch_size)):
        images = torch.stack([view.image for view in batch])  # (B, 3, S, S)
        logits.append(model(model.backbone.normalise(images)).cpu())  # (B, C)
        labels += [view.label for view in batch]
    return Scores(torch.cat(logits), torch.tensor(labels, dtype=torch.int64))


def _optimise(state: ClassifierState, batch: Batch) -> tuple[float, float]:
    """One optimiser step; returns the batch's loss and accuracy before it, over all ranks."""
    model = state.model
    images = _augmented(batch, state)  # (N, 3, S, S)
    labels = _labels(batch, model.head.out_features, model.head.weight.device)  # (N,)
    model.train()  # the caller may have evaluated the model since the last step
    logits = state.forward(images)  # (N, C)
    loss = functional.cross_entropy(logits, labels)
    accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
    # The mean over the ranks is the same on all of them, so all raise below or none does.
    mean_loss, mean_accuracy = mean_over_ranks(torch.stack([loss.detach(), accuracy])).tolist()
    if not math.isfinite(mean_loss):
        raise TrainingError(
            f"the loss is {mean_loss} at step {state.step + 1}: lower the transfer's lr or add "
            "warmup_epochs"
        )
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    return mean_loss, mean_accuracy


def _augmented(batch: Batch, state: ClassifierState) -> Tensor:
    """The batch's crops, flipped and normalised, float32 (N, 3, S, S)."""
    count = len(batch.crops)
    epoch, step = batch.position
    backbone = state.model.backbone
    views = dataclasses.replace(
        classifier_views(state.config), mean=backbone.mean, std=backbone.std
    )
    # The draw depends on the slot in the global batch, so it is the same for any number of ranks.
    slots = (rank() * count, (rank() + 1) * count)
    draws = draw_augmentation(views, seed=state.seed, epoch=epoch, step=step, slots=slots, view=0)
    return augment(batch.crops[:, 0], draws, views)


def _labels(batch: Batch, classes: int, device: torch.device) -> Tensor:
    """The batch's labels (N,) on the device, after checking that each is a class."""
    labels = torch.tensor(batch.labels, dtype=torch.int64)
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    # Summed over the ranks, since all must stop: one rank alone would leave the others waiting.
    if sum_over_ranks(torch.tensor(len(wrong), device=device)).item():
        first = ""
        if wrong:
            index = wrong[0]
            first = f"sample {batch.keys[index]} has the label {batch.labels[index]}"
        first_of_all = next(text for text in gather_objects(first) if text)
        raise ShardError(
            f"{first_of_all}: allowed are 0 to {classes - 1}; pack class folders, or name a "
            "labelled split"
        )
    return labels.to(device)
