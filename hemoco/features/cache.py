"""Features of frozen backbones, cached on a local disk.

The name of a file is the SHA-256 of everything that its features depend on: the backbone's tensors
(including BN statistics), architecture and normalisation, the identity and size of the images, the
layer, the torch version and the device type. A hit is therefore never stale, and has exactly the
bits that were computed.

Shapes: M images of S x S pixels, F features.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from hemoco.data.labelled import LabelledSplit
from hemoco.errors import CheckpointError, TrainingError, first_line
from hemoco.features.extract import extract_features
from hemoco.models.resnet import Backbone
from hemoco.storage.disk_cache import DiskCache
from hemoco.storage.tensor_files import parse_safetensors

logger = logging.getLogger(__name__)

FEATURE_CACHE_BYTES = 20 * 10**9
"""Default size limit of a cache: ResNet-18 features of 160 CIFAR-10s, or ResNet-50 of ImageNet."""
_FORMAT = "hemoco-features-1"


class FeatureCache:
    """Feature files in a folder of limited size, which several processes may share.

    A full or broken disk is logged and not an error: the features are then computed.

    Args:
        folder: folder of the files; created on first use, not accessible to other users.
        max_bytes: limit of all files together; the least recently used are removed.
    """

    def __init__(self, folder: Path, max_bytes: int = FEATURE_CACHE_BYTES) -> None:
        self._disk = DiskCache(folder, max_bytes, suffix=".safetensors")

    def load(self, key: str) -> Tensor | None:
        """Loads features (M, F) to the CPU; None if they are not in the cache.

        A damaged file is removed and counts as missing.
        """
        path = self._disk.path(key)
        try:
            file = self._disk.find(key)
            if file is None:
                return None
            with file:
                data = file.read()
        except OSError as error:
            self._warn(error)
            return None
        try:
            metadata, tensors = parse_safetensors(str(path), data)
        except CheckpointError:
            metadata, tensors = {}, {}
        if metadata.get("key") == key and metadata.get("sha256") == _digest(tensors):
            return tensors["features"]
        logger.warning("event=damaged_features_file path=%s", path)
        try:
            self._disk.remove(key)
        except OSError as error:
            self._warn(error)
        return None

    def store(self, key: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Writes a file atomically: a concurrent reader sees all of it or nothing.

        Args:
            key: the key for `load`, 64 hexadecimal digits.
            tensors: `features` (M, F), and more for other readers of the file.
            about: metadata for other readers of the file.
        """
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        data = safetensors.torch.save(on_cpu, {**about, "key": key, "sha256": _digest(on_cpu)})
        try:
            claim = self._disk.claim(key, len(data))
            if claim is not None:  # None: another process has just written the file
                with claim, claim.finish(data):
                    pass
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        logger.warning(
            "event=features_not_cached folder=%s reason=%s", self._disk.folder, first_line(error)
        )


def split_features(backbone: Backbone, split: LabelledSplit, cache: FeatureCache | None) -> Tensor:
    """Pooled features of a split, from the cache or computed; the backbone is not changed.

    Args:
        backbone: frozen backbone.
        split: M images.
        cache: None computes the features.

    Returns:
        float32 (M, F) on the backbone's device.

    Raises:
        TrainingError: the features are not finite.
    """
    if cache is None:
        return _finite_features(backbone, split)
    about = _about(backbone, split)
    # The labels are in the file too, so they are part of its key.
    digest = _digest({**backbone.encoder.state_dict(), "hemoco.labels": split.labels})
    key = hashlib.sha256(f"{json.dumps(about, sort_keys=True)} {digest}".encode()).hexdigest()
    features = cache.load(key)
    if features is None:
        features = _finite_features(backbone, split)
        cache.store(key, {"features": features, "labels": split.labels}, about)
    return features.to(backbone.pixel_mean.device)


def _finite_features(backbone: Backbone, split: LabelledSplit) -> Tensor:
    features = torch.cat([extract_features(backbone, images) for images in split.batches()])
    if not features.isfinite().all():
        raise TrainingError(
            "the backbone's features are not finite: its training has diverged; take an earlier "
            "checkpoint"
        )
    return features


def _about(backbone: Backbone, split: LabelledSplit) -> dict[str, str]:
    """Everything but tensors that the features depend on.

    The torch version and the device type are included since rounding differs between them.
    """
    return {
        "format": _FORMAT,
        "layer": "pooled",
        "architecture": backbone.config.architecture,
        "stem": backbone.config.stem,
        "shortcuts": json.dumps(backbone.config.shortcuts),
        "mean": json.dumps(backbone.mean),
        "std": json.dumps(backbone.std),
        "size": str(split.size),
        "images": split.identity,
        "torch": torch.__version__,
        "device": backbone.pixel_mean.device.type,
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        # Viewed as bytes, since NumPy has no bfloat16; flattened first, since a tensor of no
        # dimensions cannot be viewed as another dtype.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
