"""Settings as flat dotted names, as on the command line; their digest and difference."""

import dataclasses
import hashlib
import json
import re
from typing import Any

_FREE_OF_STREAM = ("workers", "memory_bytes", "disk_cache_bytes", "retry_s", "max_bad_share")
_FREE_SETTINGS = (
    "pretrain.resources.",
    "pretrain.log_every_steps",
    "pretrain.checkpoint_every_steps",
    "pretrain.keep_last",
    "pretrain.keep_every_steps",
    "pretrain.export_every_epochs",
    "pretrain.compile",
    *(f"pretrain.stream.{name}" for name in _FREE_OF_STREAM),
    "max_parallel_transfers",
    "curve",
    "sweep",  # a run is one point of it
)
_FREE_OF_TRANSFERS = (
    *("workers", "cpus", "gpus", "log_every_steps", "checkpoint_every_steps"),
    *(f"stream.{name}" for name in _FREE_OF_STREAM),
)
_OF_TRANSFER = re.compile(
    r"(transfer|transfers\.[^.]+)\."
)  # in a checkpoint, and in a recipe by its name


def flat_params(config: Any) -> dict[str, str]:
    """A config as dotted names and their values, exactly the names one types on the command line."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, dict):
            for name, item in value.items():
                walk(f"{prefix}.{name}" if prefix else name, item)
        else:
            flat[prefix] = str(value)

    walk("", config)
    return flat


def config_digest(config: Any) -> str:
    """Eight hexadecimal digits that differ when any setting differs that changes a result."""
    settings = {name: value for name, value in flat_params(config).items() if not is_free(name)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def config_difference(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Lines `name: old -> new` for every setting that differs between two flat configs and changes a result."""
    names = sorted(name for name in old.keys() | new.keys() if not is_free(name))
    return [
        f"{n}: {old.get(n, '(unset)')} -> {new.get(n, '(unset)')}"
        for n in names
        if old.get(n) != new.get(n)
    ]


def is_free(name: str) -> bool:
    """Whether a setting says where and how fast something is computed, not what: a run may go on with another."""
    name = name.removeprefix("recipe.")
    transfer = _OF_TRANSFER.match(name)
    if transfer:
        return name[transfer.end() :] in _FREE_OF_TRANSFERS
    return name.startswith(_FREE_SETTINGS)
