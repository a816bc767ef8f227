"""Some images of a data set with their features, small enough to be kept with a run: what a feature map is drawn from.

Shapes: M images, S x S pixels each, F features, T x T pixels of a thumbnail.
"""

import json
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from hemoco.data.decode import UndecodableImage, decode_image
from hemoco.data.shards.index import ShardIndex
from hemoco.data.shards.sampling import spread_samples
from hemoco.data.transforms import center_view, resize
from hemoco.errors import CheckpointError, ShardError, TrainingError
from hemoco.features.extract import extract_features
from hemoco.models.resnet import Backbone
from hemoco.storage.tensor_files import parse_safetensors

FILE_NAME = "feature_sample.safetensors"
_IMAGES = 400
_THUMBNAIL = 48  # pixels, at most
_FORMAT = "hemoco-feature-sample-1"


class FeatureSample(NamedTuple):
    """Images, by row."""

    features: Tensor
    """float16 (M, F), of length 1: their directions are what is compared; 0 where a backbone gives 0."""
    thumbnails: Tensor
    """uint8 RGB (M, 3, T, T)."""
    labels: Tensor
    """int64 (M,), -1 where there is none."""
    keys: tuple[str, ...]
    classes: tuple[str, ...]
    """By label; empty where the data set has none."""
    split: str


def sample_features(
    backbone: Backbone, data_url: str, index: ShardIndex, split: str, size: int
) -> FeatureSample:
    """The features of at most 400 images of a split, evenly spaced; those that cannot be decoded are left out.

    Args:
        backbone: on the device that computes; its mode is left as it was.
        data_url: of the shard folder.
        index: of the folder.
        split: whose images.
        size: S, of the centre view.

    Raises:
        ShardError: there is no such split, none of the images can be decoded, or they are not those that were packed.
        StorageError: the storage refuses or does not answer.
        TrainingError: features are not finite.
    """
    found = spread_samples(data_url, index.split(split), _IMAGES)
    views = [_view(sample.image, size) for sample in found]
    shown = [(sample, view) for sample, view in zip(found, views, strict=True) if view is not None]
    if not shown:
        raise ShardError(
            f"{data_url}: no image of split {split!r} can be decoded, of {len(found)} that were looked at"
        )
    images = torch.stack([view for _, view in shown])  # (M, 3, S, S)
    features = extract_features(backbone, images.to(next(backbone.parameters()).device))
    if not features.isfinite().all():
        raise TrainingError("the backbone gives features that are not finite")
    side = min(size, _THUMBNAIL)
    return FeatureSample(
        features=functional.normalize(features).to("cpu", torch.float16),
        thumbnails=torch.stack([resize(view, (side, side)) for view in images]),
        labels=torch.tensor([sample.label for sample, _ in shown]),
        keys=tuple(sample.key for sample, _ in shown),
        classes=index.classes,
        split=split,
    )


def encode_sample(sample: FeatureSample) -> bytes:
    """As a safetensors file."""
    tensors = {
        "features": sample.features,
        "thumbnails": sample.thumbnails,
        "labels": sample.labels,
    }
    about = {"keys": sample.keys, "classes": sample.classes}
    metadata = {"format": _FORMAT, "split": sample.split} | {
        name: json.dumps(value) for name, value in about.items()
    }
    return safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata
    )


def decode_sample(data: bytes) -> FeatureSample:
    """What `encode_sample` gave.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    metadata, tensors = parse_safetensors(FILE_NAME, data)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{FILE_NAME}: is of format {metadata.get('format')}, not {_FORMAT}")
    return FeatureSample(
        features=tensors["features"],
        thumbnails=tensors["thumbnails"],
        labels=tensors["labels"],
        keys=tuple(json.loads(metadata["keys"])),
        classes=tuple(json.loads(metadata["classes"])),
        split=metadata["split"],
    )


def _view(data: bytes, size: int) -> Tensor | None:
    """The centre of an image, None if it cannot be decoded: large originals are not held side by side."""
    try:
        return center_view(decode_image(data), size, size)
    except UndecodableImage:
        return None
