"""A sample of images with their features, stored with a run to draw a feature map from.

Shapes: M images of S x S pixels, F features, T x T pixels of a thumbnail.
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
_MAX_IMAGES = 400
_MAX_THUMBNAIL = 48  # pixels
_FORMAT = "hemoco-feature-sample-1"


class FeatureSample(NamedTuple):
    """M images with their features."""

    features: Tensor
    """float16 (M, F), normalised to length 1 since only directions are compared; zeros stay 0."""
    thumbnails: Tensor
    """uint8 RGB (M, 3, T, T)."""
    labels: Tensor
    """int64 (M,), -1 for an image without a label."""
    keys: tuple[str, ...]
    classes: tuple[str, ...]
    """Class names by label; empty if the data set has no classes."""
    split: str


def sample_features(
    backbone: Backbone, data_url: str, index: ShardIndex, split: str, size: int
) -> FeatureSample:
    """Computes the features of at most 400 images of a split, evenly spaced.

    Images that cannot be decoded are left out.

    Args:
        backbone: on the device to compute on; its mode is unchanged afterwards.
        data_url: URL of the shard folder.
        index: index of that folder.
        split: name of the split.
        size: S, side of the centre view.

    Raises:
        ShardError: there is no such split, no image can be decoded, or the shards are not those
            that were packed.
        StorageError: the storage refuses or does not answer.
        TrainingError: features are not finite.
    """
    samples = spread_samples(data_url, index.split(split), _MAX_IMAGES)
    views, labels, keys = [], [], []
    for sample in samples:
        # One image at a time: large originals must not be in memory together.
        try:
            views.append(center_view(decode_image(sample.image), size, size))
        except UndecodableImage:
            continue
        labels.append(sample.label)
        keys.append(sample.key)
    if not views:
        raise ShardError(
            f"{data_url}: no image of split {split!r} can be decoded, of {len(samples)} that were "
            "tried"
        )
    images = torch.stack(views)  # (M, 3, S, S)
    features = extract_features(backbone, images.to(next(backbone.parameters()).device))  # (M, F)
    if not features.isfinite().all():
        raise TrainingError("the backbone gives features that are not finite")
    side = min(size, _MAX_THUMBNAIL)
    return FeatureSample(
        features=functional.normalize(features).to("cpu", torch.float16),
        thumbnails=torch.stack([resize(view, (side, side)) for view in images]),
        labels=torch.tensor(labels),
        keys=tuple(keys),
        classes=index.classes,
        split=split,
    )


def encode_sample(sample: FeatureSample) -> bytes:
    """Encodes a sample as a safetensors file."""
    tensors = {
        "features": sample.features.contiguous(),
        "thumbnails": sample.thumbnails.contiguous(),
        "labels": sample.labels.contiguous(),
    }
    metadata = {
        "format": _FORMAT,
        "split": sample.split,
        "keys": json.dumps(sample.keys),
        "classes": json.dumps(sample.classes),
    }
    return safetensors.torch.save(tensors, metadata)


def decode_sample(data: bytes) -> FeatureSample:
    """Decodes a sample that `encode_sample` has encoded.

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
