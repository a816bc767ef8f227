"""The folder of a run, and the marker file that protects other folders from removal.

`--fresh` and `backbones delete` remove a run's folder by its name. A name can be wrong: `--storage`
may hold other things, one of which has the name of the run. So each run writes a small file with
its name into its folder, and only a folder with that file is removed. Runs begun before there was
such a file are recognised by the names of their content.
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
"""Name of the marker file in a run's folder."""
# a process that was killed while writing leaves a file that ends with .partial
_BACKBONE = re.compile(r"backbone\.safetensors(\.\d+\.partial)?")
_PRETRAINING = "pretrain"
# names in the folders of a pretraining and of a transfer, for runs without a marker
_OF_PRETRAINING = re.compile(
    rf"checkpoints|bad_samples|unsent_metrics|backbones|ray|stop|{_BACKBONE.pattern}"
)
_OF_TRANSFER = re.compile(r"[A-Za-z0-9._-]+_seed_\d+|unsent_metrics")
_TRIAL = re.compile(r"trial_\d{4,}")


def saved_names(url: str) -> list[str]:
    """Returns the names directly below a run's folder, without its marker.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    return [name for name in list_names(url) if name != MARK]


def mark_run_folder(url: str, run: str) -> None:
    """Writes the marker, unless it exists or the folder has content that no run writes.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    names = list_names(url)
    if MARK not in names and (not names or not _why_unmarked_is_foreign(url, names)):
        write_bytes(join_url(url, MARK), json.dumps({"run": run}).encode() + b"\n")


def check_run_folder(url: str, run: str) -> None:
    """Refuses a folder that is not this run's; one that is empty or does not exist passes.

    Raises:
        UsageError: the folder belongs to something else, contains another run, or is one that is
            never removed.
        StorageError: the storage refuses or does not answer.
    """
    reason = _why_never_removed(url)
    names = [] if reason else list_names(url)
    if MARK in names:
        reason = _why_marked_for_another(url, run)
    elif names:
        reason = _why_unmarked_is_foreign(url, names)
    if names and not reason:
        reason = _which_run_is_inside(url, names)
    if reason:
        raise UsageError(
            f"{url} is not a folder of run {run!r} alone: {reason}. Nothing was removed: "
            "choose another --run name or another --storage, or look into the folder and remove by "
            "hand what is no longer needed"
        )


def remove_run_folder(url: str, run: str) -> None:
    """Removes the folder of a run.

    The marker is removed last, so that the rest of an interrupted removal is still recognised.

    Raises:
        UsageError: see `check_run_folder`.
        StorageError: the storage refuses or does not answer.
    """
    check_run_folder(url, run)
    for name in saved_names(url):
        remove(join_url(url, name))
    remove(join_url(url, MARK))


def _why_never_removed(url: str) -> str:
    """Returns why a URL can never be a run's folder, whatever its content; empty if it can."""
    files, path = filesystem(url)
    if "file" not in files.protocol:
        return "" if path.strip("/").partition("/")[2] else "it is a whole bucket"
    folder = Path(path).resolve()
    for protected, name in (
        (Path.home(), "the home folder"),
        (home(), "$HEMOCO_HOME"),
        (Path.cwd(), "the working folder"),
    ):
        if protected.resolve().is_relative_to(folder):
            return f"it is or contains {name} {protected}"
    return ""


def _why_marked_for_another(url: str, run: str) -> str:
    """Returns why the marker in a folder is not that of this run; empty if it is."""
    try:
        marked = json.loads(read_bytes(join_url(url, MARK)))["run"]
    except (ValueError, KeyError, TypeError):
        return f"its {MARK} names no run"
    return "" if marked == run else f"its {MARK} names run {marked!r}"


def _which_run_is_inside(url: str, names: list[str]) -> str:
    """Returns which other run or sweep has its folder inside this one; empty if none has."""
    for name in names:
        for below in list_names(join_url(url, name)):
            if below == MARK or _TRIAL.fullmatch(below):
                return f"{name} in it is the folder of another run or sweep"
    return ""


def _why_unmarked_is_foreign(url: str, names: list[str]) -> str:
    """Returns why a folder without a marker cannot be a run's; empty if all content fits a run."""
    for name in names:
        if _BACKBONE.fullmatch(name):
            continue
        known = _OF_PRETRAINING if name == _PRETRAINING else _OF_TRANSFER
        # The folder of a transfer has the transfer's name, which can be any, so its content
        # decides. A plain file has nothing below it.
        below = list_names(join_url(url, name))
        if not below or not all(map(known.fullmatch, below)):
            return f"it has no {MARK}, and {name} in it is not what a run writes"
    return ""
