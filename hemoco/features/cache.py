"""Features of frozen backbones, cached on the disk of a machine.

A file's name is the SHA-256 of all that its features follow from: the backbone's tensors, BN statistics included, its
architecture and normalisation, the identity of the images and their size, the layer, and the arithmetic. So nothing
stale is ever found, and what is found has the bits that were computed.

Shapes: M images, S x S pixels each, F features.
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
"""What a cache holds at most by default: ResNet-18 on 160 CIFAR-10s, or ResNet-50 on one ImageNet."""
_FORMAT = "hemoco-features-1"


class FeatureCache:
    """Files of features in a folder, shared by processes side by side and never larger than a bound.

    What a full or broken disk cannot serve is computed; that is logged and no error.

    Args:
        folder: of the files; made when needed, closed to other users.
        max_bytes: of all files together; those not used for longest make room.
    """

    def __init__(self, folder: Path, max_bytes: int = FEATURE_CACHE_BYTES) -> None:
        self._disk = DiskCache(folder, max_bytes, suffix=".safetensors")

    def load(self, key: str) -> Tensor | None:
        """Features (M, F) on the CPU; None where there are none or their file is damaged, which is then removed."""
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

    def keep(self, key: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Writes a file in one step: readers see all of it or none.

        Args:
            key: by which `load` finds it, 64 hexadecimal digits.
            tensors: `features` (M, F), and what else readers of the file need.
            about: for readers of the file.
        """
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        data = safetensors.torch.save(on_cpu, {**about, "key": key, "sha256": _digest(on_cpu)})
        try:
            claim = self._disk.claim(key, len(data))
            if claim is not None:  # else another process has just written it
                with claim, claim.finish(data):
                    pass
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        logger.warning(
            "event=features_not_cached folder=%s reason=%s", self._disk.folder, first_line(error)
        )


def split_features(backbone: Backbone, split: LabelledSplit, cache: FeatureCache | None) -> Tensor:
    """Pooled features (M, F) of a split in float32, on the backbone's device; the backbone stays bit for bit.

    Raises:
        TrainingError: the features are not finite.
    """
    if cache is None:
        return _finite_features(backbone, split)
    about = _about(backbone, split)
    key = _key(about, backbone, split)
    features = cache.load(key)
    if features is None:
        features = _finite_features(backbone, split)
        cache.keep(key, {"features": features, "labels": split.labels}, about)
    return features.to(backbone.pixel_mean.device)


def _finite_features(backbone: Backbone, split: LabelledSplit) -> Tensor:
    features = torch.cat([extract_features(backbone, images) for images in split.batches()])
    if not features.isfinite().all():
        raise TrainingError(
            "the backbone's features are not finite: its training has diverged; take an earlier checkpoint"
        )
    return features


def _about(backbone: Backbone, split: LabelledSplit) -> dict[str, str]:
    """All but tensors that the features follow from; rounding differs between devices and versions of torch."""
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


def _key(about: Mapping[str, str], backbone: Backbone, split: LabelledSplit) -> str:
    tensors = {**backbone.encoder.state_dict(), "hemoco.labels": split.labels}
    return hashlib.sha256(
        f"{json.dumps(about, sort_keys=True)} {_digest(tensors)}".encode()
    ).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, kinds, shapes and values, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        # as bytes: NumPy has no bfloat16; flat: a single number has no last dimension to view otherwise
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
