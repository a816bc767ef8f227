"""Settings as flat dotted names, as on the command line, with their digest and difference.

A setting is free if it decides where and how fast something is computed, but not the result. Free
settings may change when a run is resumed; they are in neither digest nor difference.
"""

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
    "sweep",  # a run is one point of its space
)
_FREE_OF_TRANSFERS = (
    "workers",
    "cpus",
    "gpus",
    "log_every_steps",
    "checkpoint_every_steps",
    *(f"stream.{name}" for name in _FREE_OF_STREAM),
)
_OF_TRANSFER = re.compile(r"(transfer|transfers\.[^.]+)\.")
"""Prefix of a transfer's settings: `transfer.` in a checkpoint, `transfers.NAME.` in a recipe."""


def flat_params(config: Any) -> dict[str, str]:
    """The settings of a config by their dotted names, as on the command line; values as text."""
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
    """Eight hexadecimal digits, equal for two configs if all settings but the free ones are."""
    settings = {name: value for name, value in flat_params(config).items() if not is_free(name)}
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def config_difference(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Lines `name: old -> new` for all settings that differ, without the free ones."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if not is_free(name) and old.get(name) != new.get(name):
            lines.append(f"{name}: {old.get(name, '(unset)')} -> {new.get(name, '(unset)')}")
    return lines


def is_free(name: str) -> bool:
    """True if a setting may change when a run is resumed, because it does not affect the result."""
    name = name.removeprefix("recipe.")
    transfer = _OF_TRANSFER.match(name)
    if transfer:
        return name[transfer.end() :] in _FREE_OF_TRANSFERS
    return name.startswith(_FREE_SETTINGS)
