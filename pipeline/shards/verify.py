"""Verification: reads every shard of a folder and compares it with the index, in Ray tasks."""

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from typing import NamedTuple

import numpy as np

from hemoco.data.shards.index import (
    Shard,
    ShardIndex,
    check_shard,
    check_table,
    read_table,
    shard_url,
)
from hemoco.data.shards.read import cut_out, damaged_rows, is_another_shard
from hemoco.data.shards.tar import parse_tar
from hemoco.errors import HemocoError
from hemoco.storage.objects import read_bytes
from pipeline.shards.pack import flawed_samples
from pipeline.workers.tasks import Progress, run_tasks


class Verified(NamedTuple):
    """Result of a verification."""

    damages: tuple[str, ...]
    """Messages that begin with the URL of the shard or table, in the order of the index."""
    damaged: int
    """Number of damaged shards."""
    undecodable: tuple[str, ...]
    """Images of indexed tars that cannot be decoded. This is no damage: packing leaves such images
    out, but tars of others are indexed as they are."""
    annotations: dict[str, int]
    """Number of COCO annotations of each split that has some."""


class _VerifiedShard(NamedTuple):
    name: str
    split: str
    damages: list[str]
    undecodable: list[str]
    annotations: int


def verify_steps(url: str, index: ShardIndex) -> Generator[Progress, None, Verified]:
    """Verifies all shards of a folder.

    Yields the progress before the first shard and after each; returns the result.

    Args:
        url: URL of the shard folder.
        index: its index.
    """
    results: dict[str, _VerifiedShard] = {}
    yield Progress(0, len(index.shards))
    with closing(run_tasks(_verify_shard, ((url, shard) for shard in index.shards))) as finished:
        for result in finished:
            results[result.name] = result
            yield Progress(len(results), len(index.shards))
    ordered = [results[shard.name] for shard in index.shards]
    if index.packed:
        # Packing leaves out undecodable images, so one that is there now is damaged.
        ordered = [
            result._replace(damages=[*result.damages, *result.undecodable], undecodable=[])
            for result in ordered
        ]
    annotations: Counter[str] = Counter()
    for result in ordered:
        annotations[result.split] += result.annotations
    return Verified(
        damages=tuple(damage for result in ordered for damage in result.damages),
        damaged=sum(bool(result.damages) for result in ordered),
        undecodable=tuple(flaw for result in ordered for flaw in result.undecodable),
        annotations=dict(+annotations),  # + drops the splits without any
    )


def _verify_shard(url: str, shard: Shard) -> _VerifiedShard:
    """Verifies one shard and its table; runs on a Ray worker."""
    tar_url = shard_url(url, shard)
    data = b""
    try:
        data = read_bytes(tar_url)
        check_shard(tar_url, shard, data)
        content = parse_tar(data, tar_url)
    except HemocoError as error:
        damages = [f"{error}{_extent(url, shard, data)}"]
        damages += _messages(lambda: read_table(url, shard))
        return _VerifiedShard(shard.name, shard.split, damages, [], 0)
    bad = [f"{key}: {flaw}" for key, flaw in flawed_samples(content.samples)]
    undecodable = []
    if bad:
        undecodable.append(f"{tar_url}: {len(bad)} images cannot be decoded, first {bad[0]}")
    return _VerifiedShard(
        name=shard.name,
        split=shard.split,
        damages=_messages(lambda: check_table(url, shard, content.table)),
        undecodable=undecodable,
        annotations=sum(len(sample.annotations or []) for sample in content.samples),
    )


def _extent(url: str, shard: Shard, data: bytes) -> str:
    """Returns how many samples of a damaged shard differ, and what training does about it."""
    if len(data) != shard.bytes:
        return ""
    try:
        table = read_table(url, shard)
    except HemocoError:  # _verify_shard reports it
        return ""
    images = cut_out([(0, memoryview(data))], table, np.arange(shard.samples, dtype=np.int32))
    damaged = len(damaged_rows(images, table))
    if damaged == 0:
        return ""
    if is_another_shard(examined=shard.samples, damaged=damaged, samples=shard.samples):
        return f" ({damaged} of {shard.samples} samples differ: training stops at it)"
    return f" ({damaged} of {shard.samples} samples differ: training leaves them out)"


def _messages(check: Callable[[], object]) -> list[str]:
    """Returns the message of a check's error; empty if it passes."""
    try:
        check()
    except HemocoError as error:
        return [str(error)]
    return []
