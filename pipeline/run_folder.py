"""The folder of a run: its mark, by which `--fresh` and `backbones delete` recognise it before they remove anything.

A folder is removed by its name, and a name can be wrong: `--storage` may be a folder of other things, one of which has
the name of the run. So a run writes a small file into its folder that names it, and only a folder with that file is
removed. Runs begun before there was such a file are recognised by what they write.
"""

import json
import re
from pathlib import Path

from hemoco.errors import UsageError
from hemoco.storage.objects import (
    filesystem,
    home,
    join_url,
    list_names,
    read_bytes,
    remove,
    write_bytes,
)

MARK = "hemoco-run.json"
"""The file in a run's folder that names the run."""
_BACKBONE = re.compile(
    r"backbone\.safetensors(\.\d+\.partial)?"
)  # partial: a process was killed as it wrote it
_PRETRAINING = "pretrain"
# the folders of a pretraining, of a transfer and of the curve, as runs without a mark have them
_OF_PRETRAINING = re.compile(
    rf"checkpoints|bad_samples|unsent_metrics|backbones|ray|stop|{_BACKBONE.pattern}"
)
_OF_TRANSFER = re.compile(r"[A-Za-z0-9._-]+_seed_\d+|unsent_metrics")
_TRIAL = re.compile(r"trial_\d{4,}")


def saved_names(url: str) -> list[str]:
    """Names directly below a run's folder, without its mark.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    return [name for name in list_names(url) if name != MARK]


def mark_run_folder(url: str, run: str) -> None:
    """Writes the mark, unless it is there or the folder holds what no run writes.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    names = list_names(url)
    if MARK not in names and (not names or not _why_unmarked_is_foreign(url, names)):
        write_bytes(join_url(url, MARK), json.dumps({"run": run}).encode() + b"\n")


def check_run_folder(url: str, run: str) -> None:
    """Refuses a folder that is not of this very run; one that is empty or not there passes.

    Raises:
        UsageError: it is another's, holds another run, or is a place that is never removed.
        StorageError: the storage refuses or does not answer.
    """
    reason = _why_never_removed(url)
    names = [] if reason else list_names(url)
    if names and not reason:
        reason = (
            _why_marked_for_another(url, run)
            if MARK in names
            else _why_unmarked_is_foreign(url, names)
        )
        reason = reason or _what_lies_in_it(url, names)
    if reason:
        raise UsageError(
            f"{url} is not a folder of run {run!r} alone: {reason}. Nothing was removed: choose another --run name or "
            "another --storage, or look into the folder and remove by hand what is no longer needed"
        )


def remove_run_folder(url: str, run: str) -> None:
    """Removes the folder of a run, its mark last: what an interrupted removal leaves is still known to be the run's.

    Raises:
        UsageError: as `check_run_folder`.
        StorageError: the storage refuses or does not answer.
    """
    check_run_folder(url, run)
    for name in saved_names(url):
        remove(join_url(url, name))
    remove(join_url(url, MARK))


def _why_never_removed(url: str) -> str:
    """Why a place is never a run's, whatever lies in it; empty if it may be one."""
    files, path = filesystem(url)
    if "file" not in files.protocol:
        return "" if path.strip("/").partition("/")[2] else "it is a whole bucket"
    place = Path(path).resolve()
    for kept, what in (
        (Path.home(), "the home folder"),
        (home(), "$HEMOCO_HOME"),
        (Path.cwd(), "the working folder"),
    ):
        if kept.resolve().is_relative_to(place):
            return f"{what} {kept} is or lies in it"
    return ""


def _why_marked_for_another(url: str, run: str) -> str:
    """Why the mark in a folder is not that of this run; empty if it is."""
    try:
        marked = json.loads(read_bytes(join_url(url, MARK)))["run"]
    except (ValueError, KeyError, TypeError):
        return f"its {MARK} names no run"
    return "" if marked == run else f"its {MARK} names run {marked!r}"


def _what_lies_in_it(url: str, names: list[str]) -> str:
    """Which other run or sweep has its folder in this one; empty if none has."""
    for name in names:
        if any(
            below == MARK or _TRIAL.fullmatch(below) for below in list_names(join_url(url, name))
        ):
            return f"{name} in it is the folder of another run or sweep"
    return ""


def _why_unmarked_is_foreign(url: str, names: list[str]) -> str:
    """Why a folder without a mark cannot be that of a run; empty if each thing in it is what runs write."""
    for name in names:
        if _BACKBONE.fullmatch(name):
            continue
        known = _OF_PRETRAINING if name == _PRETRAINING else _OF_TRANSFER
        # a transfer's folder has its own name, so what lies in it decides; a plain file has nothing below it
        below = list_names(join_url(url, name))
        if not below or not all(map(known.fullmatch, below)):
            return f"it has no {MARK}, and {name} in it is not what a run writes"
    return ""
