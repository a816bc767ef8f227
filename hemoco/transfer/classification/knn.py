"""Weighted nearest-neighbour vote on frozen features (Wu et al. 2018, arXiv:1805.01978, section 3.4).

Numbers compare only with the same neighbours, temperature, layer and image size; here the layer is the backbone's
pooled output.

Shapes: M images in the bank, Q queries, F features, C classes, k neighbours, B queries at a time, P images of the bank
at a time.
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

# similarities of so many queries and images take 67 MB in float32, however many there are of both
_QUERIES_AT_ONCE, _IMAGES_AT_ONCE = 256, 65536
_BLOCK = 8


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
    """A bank of features (M, F) of any length, which are normalised in float32 and then get the `dtype`."""
    return Bank(functional.normalize(features.float(), dim=1).to(dtype), labels.cpu(), classes)


@torch.no_grad()
def knn_votes(
    bank: Bank, queries: Tensor, *, neighbours: int, temperature: float
) -> Iterator[Tensor]:
    """Votes (B, C) for the classes of the queries, in their order, at most 256 at a time, float32 on the CPU.

    The k nearest by cosine vote for their classes with weight exp(similarity / T), relative to that of the nearest.

    Args:
        bank: searched whole.
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
        # relative to the nearest: the vote is the same and exp does not overflow at a low temperature
        weights = (
            ((similarities - similarities.amax(dim=1, keepdim=True)) / temperature).exp().cpu()
        )
        # on the CPU, where the sum has one order
        yield torch.zeros(len(part), bank.classes).scatter_add_(
            1, bank.labels[nearest.cpu()], weights
        )


def check_neighbours(neighbours: int, images: int) -> None:
    """Refuses k where the bank has not so many images.

    Raises:
        ConfigError: it has fewer.
    """
    if not 1 <= neighbours <= images:
        raise ConfigError(
            f"knn.neighbours is {neighbours}: it must be between 1 and the {images} images of the bank; "
            f"set knn.neighbours to at most {images} or use a larger train_split"
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
    """Fraction of queries (Q, F) whose predicted class is theirs (Q,), in float32; the rest as `knn_votes`."""
    made = make_bank(bank, labels, int(labels.max()) + 1)
    votes = knn_votes(made, queries, neighbours=neighbours, temperature=temperature)
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
    """kNN accuracy of the test images with the training images as the bank.

    Nothing here is drawn: `seed` makes the signature that of all transfers.

    Raises:
        ShardError: as `check_labels`.
        ConfigError: as `knn_votes`.
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
    """Float32 similarities of queries (B, F) to their k nearest of a bank (M, F), and these (B, k); in no order."""
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(bank), _IMAGES_AT_ONCE):
        similarities = queries @ bank[start : start + _IMAGES_AT_ONCE].T  # (B, P)
        highest, places = _highest(similarities, min(neighbours, similarities.shape[1]))
        found.append((highest.float(), places + start))
        if len(found) > 1:  # at once, so that a large bank does not pile candidates up
            every, images = (
                torch.cat(parts, dim=1) for parts in zip(*found, strict=True)
            )  # (B, <= 2 k)
            highest, places = every.topk(min(neighbours, every.shape[1]), dim=1, sorted=False)
            found = [(highest, images.gather(1, places))]
    return found[0]


def _highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest values of each row (B, P) and their columns (B, count), as `topk` finds them, in no order.

    `topk` alone would take longer than the bfloat16 similarities. No more than `count` blocks hold them, those of the
    highest maxima; so it searches the maxima of blocks of 8 and then only these blocks.
    """
    rows, columns = values.shape
    blocks = columns // _BLOCK
    if columns < 4 * _BLOCK * count:  # the blocks would hold most of the columns
        return values.topk(count, dim=1, sorted=False)
    # a block is every blocks-th column, so that the maxima are taken over rows that lie whole in memory
    maxima = values[:, : _BLOCK * blocks].view(rows, _BLOCK, blocks).amax(dim=1)
    best = maxima.topk(count, dim=1, sorted=False).indices  # (B, count)
    firsts = torch.arange(0, _BLOCK * blocks, blocks, device=values.device)
    inside = (best[:, None] + firsts[:, None]).flatten(1)  # (B, 8 count)
    beyond = torch.arange(_BLOCK * blocks, columns, device=values.device).expand(rows, -1)
    candidates = torch.cat([inside, beyond], dim=1)
    highest, places = values.gather(1, candidates).topk(count, dim=1, sorted=False)
    return highest, candidates.gather(1, places)
