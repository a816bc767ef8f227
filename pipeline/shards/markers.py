"""What an interrupted pack has finished: a marker for each shard, so that the same pack goes on where it was.

The folder `unfinished/` is there from the first shard until the index is written: it says that tars which no index
names are ours, and may be replaced or removed.
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
    """Differs when a shard would be of other images, in another order, or of files that were changed.

    Raises:
        ShardError: a file is gone.
    """
    files = sorted({item.location.path for item in items})
    try:
        stats = [
            (path, stat.st_size, stat.st_mtime_ns) for path in files for stat in [Path(path).stat()]
        ]
    except OSError as error:
        raise ShardError(
            f"{error.filename}: cannot be read ({error.strerror}); it was there a moment ago"
        ) from error
    described = json.dumps([name, stats, [asdict(item) for item in items]], sort_keys=True)
    return hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()


def begin(dest: str) -> None:
    """Claims the tars that will be at `dest` before there is an index."""
    write_bytes(
        join_url(dest, UNFINISHED, "README"), b"a pack was interrupted: the same command goes on\n"
    )


def is_begun(dest: str) -> bool:
    """Whether a pack to `dest` was interrupted."""
    return bool(list_names(join_url(dest, UNFINISHED)))


def mark(dest: str, digest: str, result: dict[str, Any]) -> None:
    """Notes that a shard is written, and what there is to say of it (JSON)."""
    write_bytes(_marker(dest, digest), json.dumps(result).encode())


def marked(dest: str, digest: str) -> dict[str, Any] | None:
    """What `mark` noted, if the shard is still there."""
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
