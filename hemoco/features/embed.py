"""Embedding of a data set: the features of a frozen backbone, one Parquet file per shard.

While the backbone computes a batch, threads decode the next batches, another thread reads the next
shard and another writes the file of the previous one, so the device does not wait for them. A batch
never spans two shards, so a file does not depend on which shards were embedded with it.

Shapes: N images of a batch, S x S pixels, M images of a shard, F features.
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

_BATCHES_AHEAD = 2  # batches that are being decoded while one is computed
_IMAGES_PER_TASK = 16  # images that a decoding thread takes at a time
_Item = TypeVar("_Item")


class EmbeddedShard(NamedTuple):
    """The outcome for one shard."""

    images: int
    """Number of images in its file."""
    bad: tuple[BadSample, ...]
    """Samples that were left out."""


def embed_shards(
    plan: EmbedPlan, shards: Sequence[Shard], *, device: torch.device, threads: int
) -> Iterator[EmbeddedShard]:
    """Writes the files of the shards, in order, and yields the outcome of each.

    Bad samples, undecodable or damaged since they were packed, are left out and listed in the
    file's metadata.

    Args:
        plan: plan for the data set.
        shards: shards of its index.
        device: device to compute on.
        threads: number of threads that decode.

    Raises:
        CheckpointError: the backbone is not the one of the plan.
        ShardError: a shard is missing or not the one that was packed.
        StorageError: the storage refuses or does not answer in time.
        TrainingError: features are not finite.
    """
    backbone = _load(plan)
    backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # A chain of generators: nothing runs until the last line asks for a written file. `_ahead`
    # starts each step early, so that the steps overlap.
    with ThreadPoolExecutor(2) as storage, ThreadPoolExecutor(threads) as decoders:
        reading = _ahead((storage.submit(_read_shard, plan, shard) for shard in shards), 1)
        shards_read = (future.result() for future in reading)
        batches = _start_batches(shards_read, plan.config, decoders, pinned=device.type != "cpu")
        computed = _compute(_ahead(batches, _BATCHES_AHEAD), backbone, plan.config)
        writing = (storage.submit(_write_shard, plan, shard, backbone) for shard in computed)
        for written in _ahead(writing, 1):
            yield written.result()


class _ReadShard(NamedTuple):
    shard: Shard
    table: SampleTable
    images: list[memoryview | None]
    """Encoded images; None where the bytes are not those that were packed."""


class _Batch(NamedTuple):
    read: _ReadShard
    images: Tensor
    """uint8 (N, 3, S, S), complete when all tasks are done."""
    tasks: "list[Future[list[str]]]"
    """Decoding tasks; each returns the flaws of its images, "" for a good one."""


class _Computed(NamedTuple):
    shard: Shard
    table: SampleTable
    features: Tensor
    """Features of the good samples (M, F), on the device; they may still be being computed."""
    flaws: list[str]
    """Flaws of all samples, "" for a good one."""


def _ahead(items: Iterable[_Item], count: int) -> Iterator[_Item]:
    """Yields the items, each only after `count` further ones have been taken from the iterable.

    Taking an item starts its work, so `count` items are always in progress ahead of the consumer.
    """
    waiting: deque[_Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _load(plan: EmbedPlan) -> Backbone:
    digest = backbone_digest(plan.backbone_url)
    if digest != plan.backbone_sha256:
        raise CheckpointError(
            f"{plan.backbone_url}: was replaced meanwhile (SHA-256 {digest[:12]}..., it was "
            f"{plan.backbone_sha256[:12]}...); put it back, or name another DEST for the new one"
        )
    return load_backbone(plan.backbone_url)


def _read_shard(plan: EmbedPlan, shard: Shard) -> _ReadShard:
    """Reads a shard and its table; runs in a thread."""
    url = shard_url(plan.shards_url, shard)
    budget_s, counts = EVALUATION_PATIENCE_S, FetchCounts()
    table = patiently(lambda: read_table(plan.shards_url, shard), budget_s)
    read = whole_shard(
        url,
        shard,
        table,
        lambda: verified_shard(url, shard.bytes, shard.sha256, counts, budget_s=budget_s),
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
    every_sample = np.arange(shard.samples, dtype=np.int32)
    images = cut_out([(0, read.data)], table, every_sample)
    undamaged = [None if index in read.damaged else image for index, image in images]
    return _ReadShard(shard, table, undamaged)


def _start_batches(
    shards: Iterable[_ReadShard], config: EmbedConfig, decoders: ThreadPoolExecutor, *, pinned: bool
) -> Iterator[_Batch]:
    """Starts the decoding of batch after batch; a shard has at least one, which may be empty."""
    for read in shards:
        for first in range(0, max(len(read.images), 1), config.batch_size):
            encoded = read.images[first : first + config.batch_size]
            # Channels last in memory: decoders write and convolutions read this order.
            memory = torch.empty(
                (len(encoded), config.size, config.size, 3), dtype=torch.uint8, pin_memory=pinned
            )
            images = memory.permute(0, 3, 1, 2)  # (N, 3, S, S)
            tasks = []
            for row in range(0, len(encoded), _IMAGES_PER_TASK):
                rows = slice(row, row + _IMAGES_PER_TASK)
                tasks.append(decoders.submit(_decode, encoded[rows], images[rows], config))
            yield _Batch(read, images, tasks)


def _decode(encoded: Sequence[memoryview | None], images: Tensor, config: EmbedConfig) -> list[str]:
    """Decodes into `images` (N, 3, S, S) and returns their flaws; runs in a thread."""
    flaws = []
    for data, image in zip(encoded, images, strict=True):
        if data is None:
            flaws.append(DAMAGED)
            continue
        try:
            view = center_view(decode_image(bytes(data)), config.size, config.resize)
        except UndecodableImage as error:
            flaws.append(error.reason)
            continue
        image.copy_(view)
        flaws.append("")
    return flaws


def _compute(
    batches: Iterable[_Batch], backbone: Backbone, config: EmbedConfig
) -> Iterator[_Computed]:
    """Computes the features shard by shard; does not wait for a GPU to finish them."""
    device = backbone.pixel_mean.device
    for _, shard_batches in groupby(batches, lambda batch: batch.read.shard):
        features = [torch.empty((0, backbone.num_features), device=device)]
        flaws: list[str] = []
        for batch in shard_batches:
            batch_flaws: list[str] = []
            for task in batch.tasks:
                batch_flaws += task.result()
            flaws += batch_flaws
            good = [row for row, flaw in enumerate(batch_flaws) if not flaw]
            if good:
                # indexing copies, so it is avoided for a batch without bad samples
                images = batch.images if len(good) == len(batch_flaws) else batch.images[good]
                on_device = images.to(device, non_blocking=True)
                features.append(_features(backbone, on_device, config.precision))
        yield _Computed(batch.read.shard, batch.read.table, torch.cat(features), flaws)


def _features(backbone: Backbone, images: Tensor, precision: Precision) -> Tensor:
    """Features (N, F) of images (N, 3, S, S)."""
    lower = precision != "float32"
    dtype = getattr(torch, precision) if lower else None
    with torch.autocast(images.device.type, dtype, enabled=lower):
        return extract_features(backbone, images, batch_size=len(images))


def _write_shard(plan: EmbedPlan, computed: _Computed, backbone: Backbone) -> EmbeddedShard:
    """Writes the file of a shard; runs in a thread."""
    shard, table, features, flaws = computed
    labels, url = table.labels, shard_url(plan.shards_url, shard)
    if labels.max(initial=-1) >= len(plan.classes):
        raise ShardError(
            f"{shard.name}: label {labels.max()}, the index has {len(plan.classes)} classes; pack "
            "the data again"
        )
    keys = [key_text(key) for key in table.keys]
    good = [row for row, flaw in enumerate(flaws) if not flaw]
    stored = _stored(features, plan.config.precision)
    rows = FeatureRows([keys[row] for row in good], shard.split, labels[good], stored)
    bad = tuple(BadSample(url, key, flaw) for key, flaw in zip(keys, flaws, strict=True) if flaw)
    about = plan.identity | _origin(plan, shard, backbone)
    data = encode_file(rows, plan.classes, about, bad)
    write_bytes(join_url(plan.dest, file_name(shard.name)), data)
    return EmbeddedShard(len(good), bad)


def _stored(features: Tensor, precision: Precision) -> NDArray[np.floating[Any]]:
    """The features (M, F) on the CPU, as float16 if the precision is below float32."""
    dtype = torch.float32 if precision == "float32" else torch.float16
    stored: NDArray[np.floating[Any]] = features.to(dtype).cpu().numpy()
    if not np.isfinite(stored).all():
        raise TrainingError(
            "the backbone's features are not finite: its training has diverged, or the precision "
            "is too low for them; take an earlier checkpoint, or --precision float32"
        )
    return stored


def _origin(plan: EmbedPlan, shard: Shard, backbone: Backbone) -> dict[str, str]:
    """The origin of the features, for readers of the file."""
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
