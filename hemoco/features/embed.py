"""The features of a data set by a frozen backbone, shard by shard, each as a Parquet file of its own.

While the backbone computes a batch, threads decode the next ones, another reads the next shard, and one writes the file
of the last: a device waits for none of them. Batches do not cross shards, so that a file does not depend on which
shards were embedded beside it.

Shapes: N images of a batch, S x S pixels each, M images of a shard, F features.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hemoco.backbones.file import load_backbone
from hemoco.data.decode import UndecodableImage, decode_image
from hemoco.data.shards.index import Shard, read_table, shard_url
from hemoco.data.shards.read import cut_out, whole_shard
from hemoco.data.shards.table import SampleTable
from hemoco.data.stream.bad_samples import DAMAGED, BadSample
from hemoco.data.transforms import center_view
from hemoco.errors import CheckpointError, ShardError, TrainingError
from hemoco.features.extract import extract_features
from hemoco.features.parquet import FeatureRows, encode_file, file_name, key_text
from hemoco.features.plan import EmbedConfig, EmbedPlan, backbone_digest
from hemoco.models.heads import Precision
from hemoco.models.resnet import Backbone
from hemoco.storage.fetch import FetchCounts, verified_shard
from hemoco.storage.objects import join_url, write_bytes
from hemoco.storage.retry import EVALUATION_PATIENCE_S, patiently

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 2
_DECODED_AT_ONCE = 16
_Begun = TypeVar("_Begun")


class EmbeddedShard(NamedTuple):
    """What came of a shard."""

    images: int
    """In its file."""
    bad: tuple[BadSample, ...]
    """Left out."""


def embed_shards(
    plan: EmbedPlan, shards: Sequence[Shard], *, device: torch.device, threads: int
) -> Iterator[EmbeddedShard]:
    """Writes the files of some shards, one after the other, and says of each what came of it.

    Bad samples, undecodable or damaged since they were packed, are left out and listed in the file's metadata.

    Args:
        plan: of the data set.
        shards: some of its index.
        device: that computes.
        threads: that decode.

    Raises:
        CheckpointError: the backbone is another than the plan's.
        ShardError: a shard is missing or another than was packed.
        StorageError: the storage refuses, or did not answer in time.
        TrainingError: features are not finite.
    """
    backbone = _load(plan).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with ThreadPoolExecutor(2) as storage, ThreadPoolExecutor(threads) as decoders:
        reading = _ahead((storage.submit(_read_shard, plan, shard) for shard in shards), 1)
        batches = _begin_batches(
            (read.result() for read in reading), plan.config, decoders, pinned=device.type != "cpu"
        )
        computed = _compute(_ahead(batches, _BATCHES_AHEAD), backbone, plan.config)
        writing = (storage.submit(_write_shard, plan, shard, backbone) for shard in computed)
        yield from (written.result() for written in _ahead(writing, 1))


class _ReadShard(NamedTuple):
    shard: Shard
    table: SampleTable
    images: list[memoryview | None]
    """Encoded; None where the bytes are not those that were packed."""


class _Batch(NamedTuple):
    read: _ReadShard
    images: Tensor
    """uint8 (N, 3, S, S), complete when all parts are."""
    parts: "list[Future[list[str]]]"
    """Flaws of the images, empty where there is none."""


class _Computed(NamedTuple):
    shard: Shard
    table: SampleTable
    features: Tensor
    """Of the good samples, on the device, perhaps still being computed (M, F)."""
    flaws: list[str]
    """Of all samples."""


def _ahead(begun: Iterable[_Begun], count: int) -> Iterator[_Begun]:
    """The same, each one only when so many after it were begun, too."""
    waiting: deque[_Begun] = deque()
    for one in begun:
        waiting.append(one)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _load(plan: EmbedPlan) -> Backbone:
    found = backbone_digest(plan.backbone_url)
    if found != plan.backbone_sha256:
        raise CheckpointError(
            f"{plan.backbone_url}: was replaced meanwhile (SHA-256 {found[:12]}..., it was "
            f"{plan.backbone_sha256[:12]}...); put it back, or name another DEST for the new one"
        )
    return load_backbone(plan.backbone_url)


def _read_shard(plan: EmbedPlan, shard: Shard) -> _ReadShard:
    """Runs in a thread."""
    where, budget_s, counts = (
        shard_url(plan.shards_url, shard),
        EVALUATION_PATIENCE_S,
        FetchCounts(),
    )
    table = patiently(lambda: read_table(plan.shards_url, shard), budget_s)
    read = whole_shard(
        where,
        shard,
        table,
        lambda: verified_shard(where, shard.bytes, shard.sha256, counts, budget_s=budget_s),
        counts,
        budget_s=budget_s,
    )
    if read.flaw:
        logger.warning(
            "event=damaged_shard samples=%d damaged=%d %s",
            shard.samples,
            len(read.damaged),
            read.flaw,
        )
    images = cut_out([(0, read.data)], table, np.arange(shard.samples, dtype=np.int32))
    return _ReadShard(
        shard, table, [None if place in read.damaged else image for place, image in images]
    )


def _begin_batches(
    shards: Iterable[_ReadShard], config: EmbedConfig, decoders: ThreadPoolExecutor, *, pinned: bool
) -> Iterator[_Batch]:
    """Batches that are being decoded; at least one of each shard."""
    for read in shards:
        for first in range(0, max(len(read.images), 1), config.batch_size):
            some = read.images[first : first + config.batch_size]
            # channels last, as decoders and convolutions have them
            memory = torch.empty(
                (len(some), config.size, config.size, 3), dtype=torch.uint8, pin_memory=pinned
            )
            images = memory.permute(0, 3, 1, 2)
            cuts = [
                slice(row, row + _DECODED_AT_ONCE) for row in range(0, len(some), _DECODED_AT_ONCE)
            ]
            yield _Batch(
                read,
                images,
                [decoders.submit(_decode, some[cut], images[cut], config) for cut in cuts],
            )


def _decode(encoded: Sequence[memoryview | None], images: Tensor, config: EmbedConfig) -> list[str]:
    """Runs in a thread: makes images (N, 3, S, S) and says what is wrong with each."""
    flaws = []
    for data, image in zip(encoded, images, strict=True):
        flaw = DAMAGED if data is None else ""
        try:
            if data is not None:
                image.copy_(center_view(decode_image(bytes(data)), config.size, config.resize))
        except UndecodableImage as error:
            flaw = error.reason
        flaws.append(flaw)
    return flaws


def _compute(
    batches: Iterable[_Batch], backbone: Backbone, config: EmbedConfig
) -> Iterator[_Computed]:
    """Features of one shard after the other; what a device still computes is not waited for."""
    device = backbone.pixel_mean.device
    for _, of_shard in groupby(batches, lambda batch: batch.read.shard):
        features, flaws = [torch.empty((0, backbone.num_features), device=device)], []
        for batch in of_shard:
            read, found = batch.read, [flaw for part in batch.parts for flaw in part.result()]
            flaws += found
            good = [row for row, flaw in enumerate(found) if not flaw]
            if good:
                images = batch.images if len(good) == len(found) else batch.images[good]
                features.append(
                    _features(backbone, images.to(device, non_blocking=True), config.precision)
                )
        yield _Computed(read.shard, read.table, torch.cat(features), flaws)


def _features(backbone: Backbone, images: Tensor, precision: Precision) -> Tensor:
    """Features (N, F) of images (N, 3, S, S)."""
    lower = precision != "float32"
    with torch.autocast(
        images.device.type, getattr(torch, precision) if lower else None, enabled=lower
    ):
        return extract_features(backbone, images, batch_size=len(images))


def _write_shard(plan: EmbedPlan, computed: _Computed, backbone: Backbone) -> EmbeddedShard:
    """Runs in a thread."""
    shard, table, features, flaws = computed
    labels, where = table.labels, shard_url(plan.shards_url, shard)
    if labels.max(initial=-1) >= len(plan.classes):
        raise ShardError(
            f"{shard.name}: label {labels.max()}, the index has {len(plan.classes)} classes; pack the data again"
        )
    keys = [key_text(key) for key in table.keys]
    good = [row for row, flaw in enumerate(flaws) if not flaw]
    stored = _stored(features, plan.config.precision)
    rows = FeatureRows([keys[row] for row in good], shard.split, labels[good], stored)
    bad = tuple(BadSample(where, key, flaw) for key, flaw in zip(keys, flaws, strict=True) if flaw)
    data = encode_file(rows, plan.classes, plan.identity | _origin(plan, shard, backbone), bad)
    write_bytes(join_url(plan.dest, file_name(shard.name)), data)
    return EmbeddedShard(len(good), bad)


def _stored(features: Tensor, precision: Precision) -> NDArray[np.floating[Any]]:
    """Features (M, F) as they are stored."""
    found: NDArray[np.floating[Any]]
    found = features.to(torch.float32 if precision == "float32" else torch.float16).cpu().numpy()
    if not np.isfinite(found).all():
        raise TrainingError(
            "the backbone's features are not finite: its training has diverged, or the precision is too low for them; "
            "take an earlier checkpoint, or --precision float32"
        )
    return found


def _origin(plan: EmbedPlan, shard: Shard, backbone: Backbone) -> dict[str, str]:
    """Where features come from, for whoever reads the file."""
    config, mean, std = plan.config, backbone.mean, backbone.std
    return {
        "backbone_url": plan.backbone_url,
        "architecture": backbone.config.architecture,
        "data_url": plan.shards_url,
        "shard": shard.name,
        "shard_sha256": shard.sha256,
        "transform": f"RGB, shorter side scaled to {config.resize} (bilinear, antialiased), centre "
        f"{config.size} x {config.size}, (x / 255 - {list(mean)}) / {list(std)}",
        "torch": torch.__version__,
        "device": backbone.pixel_mean.device.type,
    }
