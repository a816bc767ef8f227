"""Packing: images of any source become shards with an index, one Ray task per shard.

The index is written last, so an interrupted pack leaves nothing that a reader would use; the same
call again writes the missing shards. The same images, seed and shard size give the same bytes. The
same call after a finished pack verifies it, and writes again what is missing or damaged. Sources
are local paths, which must exist on every node.
"""

import contextlib
import hashlib
import logging
import math
import random
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from hemoco.data.shards.index import (
    INDEX_NAME,
    Shard,
    ShardIndex,
    check_shard,
    check_table,
    read_index,
    remove_table,
    write_index,
    write_table,
)
from hemoco.data.shards.table import SampleTable
from hemoco.data.shards.tar import Sample, encode_shard, parse_tar
from hemoco.data.sources.folders import Item, Source, open_source, read_items
from hemoco.errors import ShardError, StorageError, UsageError
from hemoco.storage.objects import (
    check_url,
    check_writable,
    exists,
    join_url,
    list_names,
    read_bytes,
    remove,
    write_bytes,
)
from pipeline.shards import markers as unfinished
from pipeline.workers.tasks import Finding, Progress, count_reasons, run_tasks

if TYPE_CHECKING:
    from hemoco.data.decode import UndecodableImage

logger = logging.getLogger(__name__)

_LOGGED_SKIPS = 10
_TRAIN = "train"


@dataclass(frozen=True)
class Packed:
    """Result of a pack."""

    index: ShardIndex
    skipped: tuple[Finding, ...]
    """Images that were left out."""
    duplicates: int
    """Images of other splits whose bytes are equal to those of an image of `train`."""


class _ShardPlan(NamedTuple):
    name: str
    split: str
    items: Sequence[Item]


class _Skip(NamedTuple):
    image: str
    reason: str
    message: str


class _PackedShard(NamedTuple):
    name: str
    split: str
    shard: Shard | None
    """None if none of its images could be decoded."""
    skips: list[_Skip]
    image_digests: list[str]
    restored: list[str]
    """Flaws of an existing shard that were repaired."""

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return self._asdict() | {"shard": asdict(self.shard) if self.shard else None}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "_PackedShard":
        """Restores the value from the result of `to_json`."""
        shard = Shard(**fields["shard"]) if fields["shard"] else None
        skips = [_Skip(*skip) for skip in fields["skips"]]
        return cls(**fields | {"shard": shard, "skips": skips})


def pack_steps(
    sources: Sequence[str],
    dest: str,
    *,
    split: str,
    samples_per_shard: int,
    seed: int,
    overwrite: bool,
) -> Generator[Progress, None, Packed]:
    """Packs images into shards.

    Yields the progress before the first shard and after each; returns the result.

    Args:
        sources: local folders or archives, see `hemoco.data.sources`.
        dest: URL of the shard folder.
        split: split of images whose folder does not give one.
        samples_per_shard: most images in a shard. The shards of a split have equal numbers of
            images, or numbers that differ by one.
        seed: seed of the order in which images are distributed to shards.
        overwrite: replace other shards at `dest`. Without it, equal ones are verified and restored.

    Raises:
        UsageError: a source or the split is wrong, or `dest` has other shards.
        ShardError: a source is damaged, or none of its images can be decoded.
        StorageError: `dest` cannot be written.
    """
    if samples_per_shard < 1:
        raise UsageError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    check_url("dest", dest)
    check_writable(dest)
    source = open_source(sources, split)
    plans = _plan(source.items, samples_per_shard, seed)
    if overwrite:
        _remove_shards(dest)
    existing = existing_index(dest)
    if existing is not None and not _could_be(existing, plans, source):
        raise other_shards(dest)
    if existing is None:
        _claim(dest, plans, overwrite=overwrite)
    results = []
    yield Progress(0, len(plans))
    promised = {shard.name: shard for shard in existing.shards} if existing is not None else {}
    arguments = ((plan, dest, existing is None, promised.get(plan.name)) for plan in plans)
    for result in run_tasks(_pack_shard, arguments):
        if existing is not None and result.shard != promised.get(result.name):
            raise other_shards(dest)
        results.append(result)
        yield Progress(len(results), len(plans))
    packed = _sum_up(results, source)
    if existing is None:
        _remove_leftovers(dest, packed.index)
        write_index(dest, packed.index)
        unfinished.end(dest)
    return packed


def _claim(dest: str, plans: Sequence[_ShardPlan], *, overwrite: bool) -> None:
    """Marks `dest` as ours, unless it has tars that no index and no unfinished pack explains."""
    existing_names = {plan.name for plan in plans} & set(list_names(dest))
    if existing_names and not overwrite and not unfinished.is_begun(dest):
        raise other_shards(dest)
    unfinished.begin(dest)


def _remove_leftovers(dest: str, index: ShardIndex) -> None:
    """Removes tars and tables of interrupted packs that are not in the new index."""
    splits = "|".join(map(re.escape, index.splits))
    tars = {
        name
        for name in list_names(dest)
        if re.fullmatch(rf"({splits})-\d{{6}}\.tar(\.\d+\.partial)?", name)
    }
    for name in tars - {shard.name for shard in index.shards}:
        remove(join_url(dest, name))
    tables = set(list_names(join_url(dest, "samples")))
    for name in tables - {f"{shard.sha256}.safetensors" for shard in index.shards}:
        remove(join_url(dest, "samples", name))


def _plan(items: Sequence[Item], samples_per_shard: int, seed: int) -> list[_ShardPlan]:
    """Distributes the shuffled items of each split to shards of equal size."""
    plans = []
    for split in sorted({item.split for item in items}):
        chosen = [item for item in items if item.split == split]
        random.Random(f"{seed} {split}").shuffle(chosen)
        count = math.ceil(len(chosen) / samples_per_shard)
        bounds = [i * len(chosen) // count for i in range(count + 1)]
        for i, (first, last) in enumerate(pairwise(bounds)):
            plans.append(_ShardPlan(f"{split}-{i:06d}.tar", split, chosen[first:last]))
    return plans


def _pack_shard(plan: _ShardPlan, dest: str, new: bool, promised: Shard | None) -> _PackedShard:
    """Makes one shard and writes or restores it; runs on a Ray worker.

    Args:
        plan: the images of the shard.
        dest: URL of the shard folder.
        new: whether the index is new, so that the shard is to be written.
        promised: the shard in an existing index; it is verified and restored.
    """
    work = ""
    if new:
        work = unfinished.work_digest(plan.name, plan.items)
        known = unfinished.marked(dest, work)
        if known is not None:
            return _PackedShard.from_json(known)
    samples, skips = [], []
    for item, image in zip(plan.items, read_items(plan.items), strict=True):
        flaw = image_flaw(image)
        if flaw is None:
            samples.append(
                Sample(item.key, image, item.label, item.annotations, item.image_id, item.suffix)
            )
        else:
            skips.append(_Skip(str(item.location), flaw.reason, str(flaw)))
    digests = [hashlib.sha256(sample.image).hexdigest() for sample in samples]
    if not samples:
        return _PackedShard(plan.name, plan.split, None, skips, digests, [])
    data = encode_shard(samples)
    shard = Shard(plan.name, plan.split, len(samples), len(data), hashlib.sha256(data).hexdigest())
    table = parse_tar(data, plan.name).table
    restored: list[str] = []
    result = _PackedShard(plan.name, plan.split, shard, skips, digests, restored)
    if new:
        write_bytes(join_url(dest, plan.name), data)
        write_table(dest, shard, table)
        unfinished.mark(dest, work, result.to_json())
    elif shard == promised:
        restored += [*_restore_tar(dest, shard, data), *restore_table(dest, shard, table)]
    return result


def _restore_tar(dest: str, shard: Shard, data: bytes) -> list[str]:
    url = join_url(dest, shard.name)
    try:
        check_shard(url, shard, read_bytes(url))
    except (ShardError, StorageError) as error:
        write_bytes(url, data)
        return [str(error)]
    return []


def restore_table(dest: str, shard: Shard, table: SampleTable) -> list[str]:
    """Writes a shard's table again if it is missing or damaged; returns its flaw, if any."""
    try:
        check_table(dest, shard, table)
    except ShardError as error:
        write_table(dest, shard, table)
        return [str(error)]
    return []


def image_flaw(image: bytes) -> "UndecodableImage | None":
    """Returns why the stream could not decode an image, or None; it calls the same function."""
    from hemoco.data.decode import UndecodableImage, decode_image  # torch takes seconds to import

    try:
        decode_image(image)
    except UndecodableImage as error:
        return error
    return None


def flawed_samples(samples: Iterable[Sample]) -> Iterator[tuple[str, "UndecodableImage"]]:
    """Yields the key of each sample whose image the stream could not decode, and the reason."""
    for sample in samples:
        flaw = image_flaw(sample.image)
        if flaw is not None:
            yield sample.key, flaw


def log_restored(restored: Sequence[str]) -> None:
    """Logs what a repeated pack found missing or damaged."""
    for flaw in restored:
        logger.warning("written again: %s", flaw)


def _sum_up(results: Sequence[_PackedShard], source: Source) -> Packed:
    ordered = sorted(results, key=lambda result: result.name)
    skips = [skip for result in ordered for skip in result.skips]
    for skip in skips[:_LOGGED_SKIPS]:
        logger.warning("image skipped: image=%s reason=%s", skip.image, skip.message)
    if skips:
        logger.warning(
            "images skipped: total=%d logged=%d", len(skips), min(len(skips), _LOGGED_SKIPS)
        )
    log_restored([flaw for result in ordered for flaw in result.restored])
    shards = tuple(result.shard for result in ordered if result.shard is not None)
    if not shards:
        raise ShardError(
            f"none of the {len(skips)} images can be decoded, "
            f"first {skips[0].image}: {skips[0].message}"
        )
    train_digests: set[str] = set()
    for result in ordered:
        if result.split == _TRAIN:
            train_digests.update(result.image_digests)
    duplicates = 0
    for result in ordered:
        if result.split != _TRAIN:
            duplicates += sum(digest in train_digests for digest in result.image_digests)
    skipped = tuple(count_reasons((skip.image, skip.reason) for skip in skips))
    if duplicates:
        logger.warning("images of other splits are in %s too: duplicates=%d", _TRAIN, duplicates)
    return Packed(ShardIndex(shards, source.classes, source.categories), skipped, duplicates)


def existing_index(dest: str) -> ShardIndex | None:
    """Returns the index at `dest`, if any."""
    return read_index(dest) if exists(join_url(dest, INDEX_NAME)) else None


def _could_be(existing: ShardIndex, plans: Sequence[_ShardPlan], source: Source) -> bool:
    """Returns whether a pack could give the existing index, by names, classes and categories."""
    names = {plan.name for plan in plans}
    same_meaning = (existing.classes, existing.categories) == (source.classes, source.categories)
    return (
        existing.packed and same_meaning and all(shard.name in names for shard in existing.shards)
    )


def replaceable_index(dest: str) -> ShardIndex | None:
    """Returns the index at `dest` for --overwrite; None if there is none or it is damaged."""
    with contextlib.suppress(ShardError):
        return existing_index(dest)
    return None


def remove_tables(dest: str, shards: Iterable[Shard]) -> None:
    """Removes the tables of an index's shards."""
    for shard in shards:
        # An index that was tampered with must not make us remove other files.
        if re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
            remove_table(dest, shard)


def other_shards(dest: str) -> UsageError:
    """Returns the error for a pack or an index that would differ from what is at `dest`."""
    return UsageError(
        f"{dest} holds other shards than these would be; "
        "choose another DEST, or replace with --overwrite"
    )


def _remove_shards(dest: str) -> None:
    """Removes the shards at `dest`, their index first: no reader may find a partial folder."""
    existing = replaceable_index(dest)
    shards = existing.shards if existing is not None else ()
    packed = existing is None or existing.packed
    if not packed and any("://" not in shard.name for shard in shards):
        raise UsageError(
            f"{dest} holds tars that hemoco only made the index of; choose another DEST"
        )
    remove(join_url(dest, INDEX_NAME))
    remove_tables(dest, shards)
    for shard in shards if packed else ():
        if re.fullmatch(r"[A-Za-z0-9_-]+\.tar", shard.name):
            remove(join_url(dest, shard.name))
