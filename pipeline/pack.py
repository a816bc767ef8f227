"""Packing: images of any source become shards and their index, one Ray task per shard.

The index is written last, so a pack that was interrupted leaves nothing a reader would use, and is repeated by the same
call: the same images, seed and shard size give the same bytes. Sources are local paths that every node must see.
"""

import hashlib
import logging
import random
import re
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import ray

from hemoco.data.shards import INDEX_NAME, Sample, Shard, ShardIndex, encode_shard, read_index, write_index
from hemoco.data.sources import Item, Source, open_source, read_items
from hemoco.errors import HemocoError, ShardError, UsageError
from hemoco.storage import absolute_url, check_writable, exists, join_url, remove, write_bytes

logger = logging.getLogger(__name__)

_LOGGED_SKIPS = 10
_TRAIN = "train"


@dataclass(frozen=True)
class Packed:
    """What came of a pack."""

    index: ShardIndex
    skipped: dict[str, int]
    """How many images were left out, by reason."""
    duplicates: int
    """Images of other splits whose very bytes are in the split `train` too."""


class PackProgress(NamedTuple):
    """How far a pack is."""

    done: int
    """Shards."""
    total: int


class _ShardPlan(NamedTuple):
    name: str
    split: str
    items: Sequence[Item]


class _Skip(NamedTuple):
    image: str
    reason: str


class _PackedShard(NamedTuple):
    name: str
    split: str
    shard: Shard | None
    """None when no image of it could be decoded."""
    skips: list[_Skip]
    image_digests: list[bytes]


def pack(
    sources: Sequence[str], dest: str, *, split: str, samples_per_shard: int, seed: int, overwrite: bool = False
) -> Packed:
    """As `pack_steps`, without progress."""
    steps = pack_steps(sources, dest, split=split, samples_per_shard=samples_per_shard, seed=seed, overwrite=overwrite)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            packed: Packed = done.value
            return packed


def pack_steps(
    sources: Sequence[str], dest: str, *, split: str, samples_per_shard: int, seed: int, overwrite: bool
) -> Generator[PackProgress, None, Packed]:
    """Packs images into shards; yields before the first shard and after each, returns the result.

    Args:
        sources: local folders or archives, see `hemoco.data.sources`.
        dest: URL of the shard folder.
        split: of images that no folder puts into one.
        samples_per_shard: most images in a shard; the shards of a split are of equal size, give or take one.
        seed: of the order in which images are dealt to shards.
        overwrite: replace other shards at `dest`. Without it, equal ones are verified and left as they are.

    Raises:
        UsageError: a source or the split is wrong, or other shards are at `dest`.
        ShardError: a source is damaged, or none of its images can be decoded.
        StorageError: `dest` cannot be written.
    """
    if samples_per_shard < 1:
        raise UsageError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    dest = absolute_url(dest)
    check_writable(dest)
    source = open_source(sources, split)
    plans = _plan(source.items, samples_per_shard, seed)
    if overwrite:
        _remove_shards(dest)
    existing = _existing(dest)
    if existing is not None and not _could_be(existing, plans, source):
        raise _other_shards(dest)
    results = []
    yield PackProgress(0, len(plans))
    for result in _run(plans, dest if existing is None else None):
        if existing is not None and result.shard != _named(existing, result.name):
            raise _other_shards(dest)
        results.append(result)
        yield PackProgress(len(results), len(plans))
    packed = _sum_up(results, source)
    if existing is None:
        write_index(dest, packed.index)
    return packed


def _plan(items: Sequence[Item], samples_per_shard: int, seed: int) -> list[_ShardPlan]:
    """Deals the shuffled items of each split to shards of equal size."""
    plans = []
    for split in sorted({item.split for item in items}):
        chosen = [item for item in items if item.split == split]
        random.Random(f"{seed} {split}").shuffle(chosen)
        count = -(-len(chosen) // samples_per_shard)
        bounds = [i * len(chosen) // count for i in range(count + 1)]
        for i, (first, last) in enumerate(pairwise(bounds)):
            plans.append(_ShardPlan(f"{split}-{i:06d}.tar", split, chosen[first:last]))
    return plans


def _run(plans: Sequence[_ShardPlan], dest: str | None) -> Iterator[_PackedShard]:
    """Yields what became of each shard, as they get ready."""
    task = ray.remote(num_cpus=1, max_retries=2)(_pack_shard)
    waiting = iter(plans)
    # some more than cores, so that no core waits for this process
    in_flight = int(ray.cluster_resources().get("CPU", 1)) + 2
    running = [task.remote(plan, dest) for plan in islice(waiting, in_flight)]
    try:
        while running:
            (ready,), running = ray.wait(running)
            running += [task.remote(plan, dest) for plan in islice(waiting, 1)]
            yield _result(ready)
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: "ray.ObjectRef[_PackedShard]") -> _PackedShard:
    try:
        result: _PackedShard = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HemocoError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HemocoError(f"a Ray worker was lost while packing ({reason}); run the same command again") from error
    return result


def _pack_shard(plan: _ShardPlan, dest: str | None) -> _PackedShard:
    """Runs on a Ray worker: makes one shard, and writes it where there is a `dest`."""
    samples, skips = [], []
    for item, image in zip(plan.items, read_items(plan.items), strict=True):
        reason = _flaw(image)
        if reason is None:
            samples.append(Sample(item.key, image, item.label, item.annotations, item.image_id, item.suffix))
        else:
            skips.append(_Skip(str(item.location), reason))
    digests = [hashlib.sha256(sample.image).digest() for sample in samples]
    if not samples:
        return _PackedShard(plan.name, plan.split, None, skips, digests)
    data = encode_shard(samples)
    if dest is not None:
        write_bytes(join_url(dest, plan.name), data)
    shard = Shard(plan.name, plan.split, len(samples), len(data), hashlib.sha256(data).hexdigest())
    return _PackedShard(plan.name, plan.split, shard, skips, digests)


def _flaw(image: bytes) -> str | None:
    """Why the stream could not use an image; found by the very function that decodes it there."""
    from hemoco.data.views import decode_image

    try:
        decode_image(image)
    except ShardError as error:
        return str(error)
    return None


def _sum_up(results: Sequence[_PackedShard], source: Source) -> Packed:
    ordered = sorted(results, key=lambda result: result.name)
    skips = [skip for result in ordered for skip in result.skips]
    for skip in skips[:_LOGGED_SKIPS]:
        logger.warning("image skipped: image=%s reason=%s", skip.image, skip.reason)
    if skips:
        logger.warning("images skipped: total=%d logged=%d", len(skips), min(len(skips), _LOGGED_SKIPS))
    shards = tuple(result.shard for result in ordered if result.shard is not None)
    if not shards:
        raise ShardError(f"none of the {len(skips)} images can be decoded, first {skips[0].image}: {skips[0].reason}")
    train = {digest for result in ordered if result.split == _TRAIN for digest in result.image_digests}
    others = (digest for result in ordered if result.split != _TRAIN for digest in result.image_digests)
    duplicates = sum(digest in train for digest in others)
    reasons = dict(Counter(skip.reason for skip in skips))
    if duplicates:
        logger.warning("images of other splits are in %s too: duplicates=%d", _TRAIN, duplicates)
    return Packed(ShardIndex(shards, source.classes, source.categories), reasons, duplicates)


def _existing(dest: str) -> ShardIndex | None:
    return read_index(dest) if exists(join_url(dest, INDEX_NAME)) else None


def _could_be(existing: ShardIndex, plans: Sequence[_ShardPlan], source: Source) -> bool:
    """Whether the pack could end in the existing index, as far as names tell."""
    names = {plan.name for plan in plans}
    same_meaning = (existing.classes, existing.categories) == (source.classes, source.categories)
    return same_meaning and all(shard.name in names for shard in existing.shards)


def _named(index: ShardIndex, name: str) -> Shard | None:
    return next((shard for shard in index.shards if shard.name == name), None)


def _remove_shards(dest: str) -> None:
    """Removes the index first, so that no reader meets half a shard folder, then the shards it named."""
    try:
        existing = _existing(dest)
    except ShardError:
        existing = None  # damaged: it names nothing that could be trusted
    remove(join_url(dest, INDEX_NAME))
    for shard in existing.shards if existing is not None else ():
        if re.fullmatch(r"[A-Za-z0-9_-]+\.tar", shard.name):
            remove(join_url(dest, shard.name))


def _other_shards(dest: str) -> UsageError:
    return UsageError(
        f"{dest} holds other shards than these would be; choose another DEST, or replace with --overwrite"
    )
