"""Verifying: every shard of a folder is read again and compared with the index, one Ray task per shard."""

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
from pipeline.shards.pack import image_flaw
from pipeline.workers.tasks import Progress, run_tasks


class Verified(NamedTuple):
    """What came of reading all shards."""

    damages: tuple[str, ...]
    """What is wrong, each with the URL of its shard or table first; in index order."""
    damaged: int
    """Shards."""
    undecodable: tuple[str, ...]
    """Images of others' tars that cannot be decoded, which is no damage: they were like that when they were indexed."""
    annotations: dict[str, int]
    """COCO annotations of each split that has some."""


class _VerifiedShard(NamedTuple):
    name: str
    split: str
    damages: list[str]
    undecodable: list[str]
    annotations: int


def verify_steps(url: str, index: ShardIndex) -> Generator[Progress, None, Verified]:
    """Reads all shards of the folder at a URL; yields before the first and after each, returns what is wrong."""
    results: dict[str, _VerifiedShard] = {}
    yield Progress(0, len(index.shards))
    with closing(run_tasks(_verify_shard, ((url, shard) for shard in index.shards))) as finished:
        for result in finished:
            results[result.name] = result
            yield Progress(len(results), len(index.shards))
    ordered = [results[shard.name] for shard in index.shards]
    if index.packed:  # packing leaves out what cannot be decoded
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
        annotations=dict(+annotations),
    )


def _verify_shard(url: str, shard: Shard) -> _VerifiedShard:
    """Runs on a Ray worker: everything that is wrong with one shard and its table."""
    where = shard_url(url, shard)
    data = b""
    try:
        data = read_bytes(where)
        check_shard(where, shard, data)
        content = parse_tar(data, where)
    except HemocoError as error:
        flaw = f"{error}{_extent(url, shard, data)}"
        return _VerifiedShard(
            shard.name, shard.split, [flaw, *_complaint(read_table, url, shard)], [], 0
        )
    flaws = ((sample.key, image_flaw(sample.image)) for sample in content.samples)
    bad = [f"{key}: {flaw}" for key, flaw in flaws if flaw is not None]
    return _VerifiedShard(
        name=shard.name,
        split=shard.split,
        damages=_complaint(check_table, url, shard, content.table),
        undecodable=[f"{where}: {len(bad)} images cannot be decoded, first {bad[0]}"]
        if bad
        else [],
        annotations=sum(len(sample.annotations or []) for sample in content.samples),
    )


def _extent(url: str, shard: Shard, data: bytes) -> str:
    """What a flaw of a whole shard means for training: how many samples it costs, or that it is an error there."""
    if len(data) != shard.bytes:
        return ""
    try:
        table = read_table(url, shard)
    except HemocoError:  # named by itself
        return ""
    images = cut_out([(0, memoryview(data))], table, np.arange(shard.samples, dtype=np.int32))
    damaged = len(damaged_rows(images, table))
    if damaged == 0:
        return ""
    if is_another_shard(examined=shard.samples, damaged=damaged, samples=shard.samples):
        return f" ({damaged} of {shard.samples} samples differ: training stops at it)"
    return f" ({damaged} of {shard.samples} samples differ: training leaves them out)"


def _complaint(check: Callable[..., object], *words: object) -> list[str]:
    try:
        check(*words)
    except HemocoError as error:
        return [str(error)]
    return []
