"""Weighted nearest-neighbour vote on frozen features (Wu et al. 2018, arXiv:1805.01978, section 3.4).

Numbers compare only with the same neighbours, temperature, layer and image size; here the layer is the backbone's
pooled output.

Shapes: M images in the bank, Q queries, F features, C classes, S x S an image, k neighbours.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hemoco.config import KnnConfig
from hemoco.encoder import Backbone
from hemoco.errors import ConfigError
from hemoco.transfer.frozen import accuracies, count_classes
from hemoco.transfer.result import LabelledImages, TransferResult

_QUERIES_AT_ONCE = 256  # similarities to the images of ImageNet then take 1.3 GB


@torch.no_grad()
def extract_features(backbone: Backbone, images: Tensor, batch_size: int = 256) -> Tensor:
    """Features (M, F) in float32, computed in evaluation mode on the backbone's device, where they stay.

    The backbone's tensors and its mode are left as they were.

    Args:
        backbone: all of it on one device.
        images: uint8 RGB (M, 3, S, S).
        batch_size: images computed at a time; does not change the features.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        return torch.cat([backbone(backbone.normalise(part)).float() for part in torch.split(images, batch_size)])
    finally:
        backbone.train(was_training)


@torch.no_grad()
def knn_predict(
    bank: Tensor, labels: Tensor, queries: Tensor, *, neighbours: int, temperature: float, classes: int
) -> Tensor:
    """Each query's class: its k nearest by cosine vote for theirs with weight exp(similarity / T).

    Args:
        bank: features (M, F).
        labels: classes of the bank (M,).
        queries: features (Q, F).
        neighbours: k, at most M.
        temperature: T > 0.
        classes: C.

    Returns:
        Classes (Q,), on the CPU.

    Raises:
        ConfigError: the bank has fewer images than neighbours, or the temperature is not positive.
    """
    if not 1 <= neighbours <= len(bank):
        raise ConfigError(
            f"knn.neighbours is {neighbours}: it must be between 1 and the {len(bank)} images of the bank; "
            f"set knn.neighbours to at most {len(bank)} or use a larger train_split"
        )
    if temperature <= 0:
        raise ConfigError(f"knn.temperature is {temperature}: it must be positive")
    bank, labels = functional.normalize(bank.float(), dim=1), labels.cpu()
    predictions = []
    for part in torch.split(functional.normalize(queries.float(), dim=1), _QUERIES_AT_ONCE):
        similarities, nearest = (part @ bank.T).topk(neighbours, dim=1)  # (Q, k), the most similar first
        # relative to the nearest: the vote is the same and exp does not overflow at a low temperature
        weights = ((similarities - similarities[:, :1]) / temperature).exp().cpu()
        # on the CPU, where the sum has one order
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[nearest.cpu()], weights)  # (Q, C)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, *, neighbours: int, temperature: float
) -> float:
    """Fraction of queries (Q, F) whose predicted class is theirs (Q,); the rest as `knn_predict`."""
    predictions = knn_predict(
        bank, labels, queries, neighbours=neighbours, temperature=temperature, classes=int(labels.max()) + 1
    )
    return accuracies(predictions, query_labels.cpu())["top1"]


def run_knn(
    config: KnnConfig, backbone: Backbone, train: LabelledImages, test: LabelledImages, seed: int
) -> TransferResult:
    """kNN accuracy of the test images with the training images as the bank.

    Nothing here is drawn: `seed` makes the signature that of all transfers.

    Raises:
        ConfigError: as `knn_predict`.
    """
    predictions = knn_predict(
        extract_features(backbone, train.images),
        train.labels,
        extract_features(backbone, test.images),
        neighbours=config.neighbours,
        temperature=config.temperature,
        classes=count_classes(train, test),
    )
    metrics = accuracies(predictions, test.labels.cpu())
    return TransferResult(metric="top1", value=metrics["top1"], metrics=metrics)
