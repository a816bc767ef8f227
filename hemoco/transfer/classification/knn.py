"""Weighted kNN classification of frozen features (Wu et al. 2018, arXiv:1805.01978, section 3.4).

Accuracies are comparable only for equal k, temperature, layer and image size. The layer here is the
backbone's pooled output.

Shapes: M images in the bank, Q queries, F features, C classes, k neighbours, B queries in a part,
P images of the bank in a part.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hemoco.config import KnnConfig
from hemoco.data.labelled import LabelledSplit
from hemoco.errors import ConfigError
from hemoco.features.cache import FeatureCache, split_features
from hemoco.models.resnet import Backbone
from hemoco.transfer.classification.scores import (
    check_labels,
    classification_result,
    count_predictions,
    sum_counts,
)
from hemoco.transfer.result import TransferResult

# A (256, 65536) float32 part of the similarities takes 67 MB, whatever the size of bank and split.
_QUERIES_AT_ONCE, _IMAGES_AT_ONCE = 256, 65536
_BLOCK = 8  # columns whose maximum stands for them in the search


class Bank(NamedTuple):
    """Labelled images to search."""

    features: Tensor
    """Unit vectors (M, F) in the precision of the similarities."""
    labels: Tensor
    """Classes (M,) on the CPU."""
    classes: int
    """C."""


def make_bank(
    features: Tensor, labels: Tensor, classes: int, dtype: torch.dtype = torch.float32
) -> Bank:
    """Makes a bank of features (M, F), normalised in float32 and then cast to `dtype`.

    Args:
        features: (M, F), of any norm.
        labels: classes (M,).
        classes: C.
        dtype: precision of the similarities.
    """
    return Bank(functional.normalize(features.float(), dim=1).to(dtype), labels.cpu(), classes)


@torch.no_grad()
def knn_votes(
    bank: Bank, queries: Tensor, *, neighbours: int, temperature: float
) -> Iterator[Tensor]:
    """Yields the votes for each class, float32 (B, C) on the CPU, for 256 queries at a time.

    The k nearest images by cosine similarity vote for their class with the weight
    exp(similarity / T), relative to the weight of the nearest.

    Args:
        bank: labelled images, all of which are searched.
        queries: features (Q, F), on the bank's device.
        neighbours: k, at most M.
        temperature: T > 0.

    Raises:
        ConfigError: the bank has fewer images than neighbours, or the temperature is not positive.
    """
    check_neighbours(neighbours, len(bank.features))
    if temperature <= 0:
        raise ConfigError(f"knn.temperature is {temperature}: it must be positive")
    for part in torch.split(queries, _QUERIES_AT_ONCE):
        unit = functional.normalize(part.float(), dim=1).to(bank.features.dtype)
        similarities, nearest = _nearest_images(unit, bank.features, neighbours)  # (B, k)
        # Relative to the nearest, which leaves the winner the same: exp(similarity / T) itself
        # overflows at a low temperature.
        relative = similarities - similarities.amax(dim=1, keepdim=True)
        weights = (relative / temperature).exp().cpu()  # (B, k)
        # On the CPU, since scatter_add_ on a GPU sums in no fixed order.
        votes = torch.zeros(len(part), bank.classes)
        yield votes.scatter_add_(1, bank.labels[nearest.cpu()], weights)  # (B, C)


def check_neighbours(neighbours: int, images: int) -> None:
    """Refuses a k that is larger than the number of images in the bank.

    Raises:
        ConfigError: k is not between 1 and the number of images.
    """
    if not 1 <= neighbours <= images:
        raise ConfigError(
            f"knn.neighbours is {neighbours}: it must be between 1 and the {images} images of the "
            f"bank; set knn.neighbours to at most {images} or use a larger train_split"
        )


def knn_accuracy(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    neighbours: int,
    temperature: float,
) -> float:
    """The fraction of queries whose class is predicted correctly, in float32.

    Args:
        bank: features (M, F).
        labels: classes of the bank (M,).
        queries: features (Q, F), on the bank's device.
        query_labels: classes of the queries (Q,).
        neighbours: k, at most M.
        temperature: T > 0.

    Raises:
        ConfigError: see `knn_votes`.
    """
    float32_bank = make_bank(bank, labels, int(labels.max()) + 1)
    votes = knn_votes(float32_bank, queries, neighbours=neighbours, temperature=temperature)
    predictions = torch.cat([part.argmax(dim=1) for part in votes])
    return (predictions == query_labels.cpu()).double().mean().item()


def run_knn(
    config: KnnConfig,
    backbone: Backbone,
    train: LabelledSplit,
    test: LabelledSplit,
    seed: int,
    cache: FeatureCache | None = None,
) -> TransferResult:
    """Measures the kNN accuracy on the test split, with the training split as the bank.

    Nothing is random here; `seed` is unused and only keeps the signature common to all transfers.

    Raises:
        ShardError: see `check_labels`.
        ConfigError: see `knn_votes`.
    """
    classes = check_labels(train, test)
    features, queries = (split_features(backbone, split, cache) for split in (train, test))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision]
    bank = make_bank(features, train.labels, classes, dtype)
    votes = knn_votes(bank, queries, neighbours=config.neighbours, temperature=config.temperature)
    labels = torch.split(test.labels.cpu(), _QUERIES_AT_ONCE)
    counts = sum_counts(count_predictions(*pair) for pair in zip(votes, labels, strict=True))
    return classification_result(counts, train.classes, also={})


def _nearest_images(queries: Tensor, bank: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The k nearest images of a bank (M, F) for queries (B, F), in no order.

    Returns:
        Float32 similarities (B, k) and rows in the bank (B, k).
    """
    best = torch.empty(0)
    nearest = torch.empty(0, dtype=torch.int64)
    for start in range(0, len(bank), _IMAGES_AT_ONCE):
        part = queries @ bank[start : start + _IMAGES_AT_ONCE].T  # (B, P)
        highest, columns = _highest(part, min(neighbours, part.shape[1]))
        similarities, rows = highest.float(), columns + start
        if start > 0:
            # Merged after every part, so that the candidates of a large bank do not accumulate.
            candidates = torch.cat([best, similarities], dim=1)  # (B, at most 2 k)
            candidate_rows = torch.cat([nearest, rows], dim=1)
            count = min(neighbours, candidates.shape[1])
            similarities, chosen = candidates.topk(count, dim=1, sorted=False)
            rows = candidate_rows.gather(1, chosen)
        best, nearest = similarities, rows
    return best, nearest


def _highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest values of each row of (B, P), in no order.

    `topk` over all columns takes longer than the bfloat16 similarities themselves. The columns are
    therefore divided into blocks of 8: the highest values lie in the `count` blocks with the
    highest maxima, so `topk` runs over the maxima and then over these blocks only.

    Returns:
        The values (B, count) and their columns (B, count).
    """
    rows, columns = values.shape
    if columns < 4 * _BLOCK * count:  # the selected blocks would hold most of the columns
        return values.topk(count, dim=1, sorted=False)
    blocks = columns // _BLOCK
    blocked = _BLOCK * blocks  # columns in blocks; the few beyond are all candidates
    # Block i is columns i, i + blocks, ...: so amax reads whole contiguous rows of memory.
    maxima = values[:, :blocked].view(rows, _BLOCK, blocks).amax(dim=1)  # (B, blocks)
    best = maxima.topk(count, dim=1, sorted=False).indices  # (B, count)
    firsts = torch.arange(0, blocked, blocks, device=values.device)  # (8,)
    inside = (best[:, None] + firsts[:, None]).flatten(1)  # (B, 8 count)
    beyond = torch.arange(blocked, columns, device=values.device).expand(rows, -1)
    candidates = torch.cat([inside, beyond], dim=1)
    highest, chosen = values.gather(1, candidates).topk(count, dim=1, sorted=False)
    return highest, candidates.gather(1, chosen)  # (B, count)
