"""Indexing of tars in webdataset's format: they become shards without being copied or changed.

Each tar is one Ray task. Only the index and the tables of samples are written. Undecodable images
are reported but stay in the tars, and the stream replaces them when it reads. The same call again
verifies the existing index.
"""

import hashlib
import re
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

from hemoco.data.shards.index import Shard, ShardIndex, write_index, write_table
from hemoco.data.shards.tar import parse_tar
from hemoco.data.sources.tars import SourceTar, find_tars
from hemoco.errors import HemocoError, ShardError
from hemoco.storage.objects import (
    check_url,
    check_writable,
    join_url,
    list_names,
    read_bytes,
    remove,
)
from pipeline.shards.pack import (
    existing_index,
    flawed_samples,
    log_restored,
    other_shards,
    remove_tables,
    replaceable_index,
    restore_table,
)
from pipeline.workers.tasks import Finding, Progress, count_reasons, run_tasks, unite_findings


@dataclass(frozen=True)
class Indexed:
    """Result of indexing."""

    index: ShardIndex
    left_out: tuple[Finding, ...]
    """Members of tars that belong to no sample or are not read."""
    undecodable: tuple[Finding, ...]
    """Images that cannot be decoded; they stay in the index."""
    empty: tuple[str, ...]
    """Tars without samples."""


class _IndexedTar(NamedTuple):
    shard: Shard
    last_label: int
    left_out: list[Finding]
    undecodable: list[Finding]
    restored: list[str]


def index_steps(
    sources: Sequence[str], dest: str, *, split: str, overwrite: bool
) -> Generator[Progress, None, Indexed]:
    """Writes the index of tars.

    Yields the progress before the first tar and after each; returns the result. Labels are the
    numbers in `.cls`, which are also the names of the classes.

    Args:
        sources: folders, tars or patterns, see `hemoco.data.sources.tars`.
        dest: URL of the shard folder. Tars inside it are named relative to it, so that the folder
            can be moved as a whole.
        split: split of tars whose name and folder do not give one.
        overwrite: replace another index at `dest`; tars are never removed.

    Raises:
        UsageError: a source or the split is wrong, or `dest` has another index.
        ShardError: a tar is damaged, or none has a sample; nothing is left at `dest` then.
        StorageError: a tar cannot be read, or `dest` cannot be written.
    """
    check_url("dest", dest)
    check_writable(dest)
    tars = find_tars(sources, split)
    replaced = replaceable_index(dest) if overwrite else None
    existing = None if overwrite else existing_index(dest)
    promised = {shard.name: shard for shard in existing.shards} if existing is not None else {}
    if existing is not None and (
        existing.packed or promised.keys() != {_name(tar, dest) for tar in tars}
    ):
        raise other_shards(dest)
    arguments = ((tar, dest, existing is None, promised.get(_name(tar, dest))) for tar in tars)
    before = list_names(join_url(dest, "samples"))
    results = []
    yield Progress(0, len(tars))
    try:
        with closing(run_tasks(_index_tar, arguments)) as finished:
            for result in finished:
                if existing is not None and result.shard != promised[result.shard.name]:
                    raise other_shards(dest)
                results.append(result)
                yield Progress(len(results), len(tars))
        indexed = _sum_up(results)
    except HemocoError:
        _remove_new_tables(dest, before)
        raise
    if existing is None:
        write_index(dest, indexed.index)
        if replaced is not None:
            # only now: readers of the old index need its tables until the new one is there
            still_used = {shard.sha256 for shard in indexed.index.shards}
            remove_tables(
                dest, (shard for shard in replaced.shards if shard.sha256 not in still_used)
            )
    elif existing != indexed.index:
        raise other_shards(dest)
    return indexed


def _index_tar(tar: SourceTar, dest: str, new: bool, promised: Shard | None) -> _IndexedTar:
    """Reads one tar and writes its table, or restores the table; runs on a Ray worker.

    Args:
        tar: the tar.
        dest: URL of the shard folder.
        new: whether the index is new, so that the table is to be written.
        promised: the tar's shard in an existing index, whose table is verified and restored.
    """
    data = read_bytes(tar.url)
    content = parse_tar(data, tar.url)
    shard = Shard(
        _name(tar, dest),
        tar.split,
        len(content.samples),
        len(data),
        hashlib.sha256(data).hexdigest(),
    )
    restored = []
    if new:
        write_table(dest, shard, content.table)
    elif shard == promised:
        restored = restore_table(dest, shard, content.table)
    tar_name = tar.url.rpartition("/")[2]
    undecodable = [
        (f"{key} in {tar_name}", flaw.reason) for key, flaw in flawed_samples(content.samples)
    ]
    return _IndexedTar(
        shard=shard,
        last_label=int(content.table.labels.max(initial=-1)),
        left_out=count_reasons(
            (f"{name} in {tar_name}", reason) for name, reason in content.skipped
        ),
        undecodable=count_reasons(undecodable),
        restored=restored,
    )


def _sum_up(results: Sequence[_IndexedTar]) -> Indexed:
    ordered = sorted(results, key=lambda result: result.shard.name)
    left_out = tuple(unite_findings(finding for result in ordered for finding in result.left_out))
    undecodable = tuple(
        unite_findings(finding for result in ordered for finding in result.undecodable)
    )
    log_restored([flaw for result in ordered for flaw in result.restored])
    shards = tuple(result.shard for result in ordered)
    if not any(shard.samples for shard in shards):
        odd = f"; {left_out[0].reason}: {left_out[0].first}" if left_out else ""
        raise ShardError(f"none of the {len(shards)} tars holds a sample{odd}")
    last_label = max(result.last_label for result in ordered)
    classes = tuple(str(label) for label in range(last_label + 1))
    empty = tuple(shard.name for shard in shards if shard.samples == 0)
    return Indexed(ShardIndex(shards, classes, (), packed=False), left_out, undecodable, empty)


def _remove_new_tables(dest: str, before: Sequence[str]) -> None:
    """Removes the tables in `samples/` that were not there before."""
    folder = join_url(dest, "samples")
    for name in set(list_names(folder)) - set(before):
        if re.fullmatch(r"[0-9a-f]{64}\.[a-z]+", name):
            remove(join_url(folder, name))
    if not list_names(folder):
        remove(folder)


def _name(tar: SourceTar, dest: str) -> str:
    return tar.url.removeprefix(f"{dest}/")
