"""Markers of the shards that an unfinished pack has written, by which the same pack resumes.

They are in the folder `unfinished/`, from the first shard until the index is written. The folder
also shows that tars without an index are ours, and may be replaced or removed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hemoco.data.shards.index import UNFINISHED, Shard
from hemoco.data.sources.folders import Item
from hemoco.errors import ShardError, StorageError
from hemoco.storage.objects import exists, join_url, list_names, read_bytes, remove, write_bytes


def work_digest(name: str, items: Sequence[Item]) -> str:
    """Returns a digest of a shard's name, its images in their order, and the state of their files.

    Raises:
        ShardError: a file has been removed.
    """
    stats = []
    for path in sorted({item.location.path for item in items}):
        try:
            stat = Path(path).stat()
        except OSError as error:
            raise ShardError(
                f"{error.filename}: cannot be read ({error.strerror}); "
                "it was there when the pack began"
            ) from error
        stats.append((path, stat.st_size, stat.st_mtime_ns))
    described = json.dumps([name, stats, [asdict(item) for item in items]], sort_keys=True)
    return hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()


def begin(dest: str) -> None:
    """Marks `dest` as an unfinished pack's, so that its tars without an index are known as ours."""
    write_bytes(
        join_url(dest, UNFINISHED, "README"), b"a pack was interrupted: the same command goes on\n"
    )


def is_begun(dest: str) -> bool:
    """Returns whether a pack to `dest` has begun and is not finished."""
    return bool(list_names(join_url(dest, UNFINISHED)))


def mark(dest: str, digest: str, result: dict[str, Any]) -> None:
    """Records that a shard is written, with its result as JSON."""
    write_bytes(_marker(dest, digest), json.dumps(result).encode())


def marked(dest: str, digest: str) -> dict[str, Any] | None:
    """Returns the result that `mark` recorded; None if there is none or the shard is gone."""
    try:
        result: dict[str, Any] = json.loads(read_bytes(_marker(dest, digest)))
    except (StorageError, ValueError):
        return None
    shard = result["shard"]
    return result if shard is None or exists(join_url(dest, Shard(**shard).name)) else None


def end(dest: str) -> None:
    """Removes all markers."""
    remove(join_url(dest, UNFINISHED))


def _marker(dest: str, digest: str) -> str:
    return join_url(dest, UNFINISHED, f"{digest}.json")
