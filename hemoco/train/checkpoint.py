"""Checkpoints of a training run: writing, finding, verifying, loading and pruning them.

A checkpoint is a folder `step_00000100_a1` (optimiser steps done, attempt) with two files:

- `state.pt`: what `TrainingState.state_dict` returns, written by `torch.save`.
- `manifest.json`: format, step, attempt, size and SHA-256 of `state.pt`, digest of the shards, and
  the settings as flat names.

The manifest is written last. A folder without it is an interrupted write and is ignored; where the
SHA-256 disagrees, the checkpoint is damaged and is skipped with a warning.
"""

import hashlib
import io
import json
import logging
import pickle
import re
from typing import Any, NamedTuple

import torch

from hemoco.config import EncoderConfig, config_difference
from hemoco.distributed import broadcast_object, rank
from hemoco.errors import CheckpointError
from hemoco.storage.objects import join_url, list_names, read_bytes, remove, write_bytes
from hemoco.train.state import TrainingState

logger = logging.getLogger(__name__)

_FORMAT = "hemoco-checkpoint-1"
_STATE, _MANIFEST = "state.pt", "manifest.json"
_FOLDER = re.compile(r"step_(\d{8,})_a(\d+)")


class SavedMethod(NamedTuple):
    """The method's part of a checkpoint, without optimiser and stream."""

    encoder: EncoderConfig
    """Config of the encoder; the settings of its initialisation are the defaults."""
    epoch: int
    """Epochs begun."""
    tensors: dict[str, torch.Tensor]
    """State of the method, by name."""


class _CheckpointId(NamedTuple):
    """Step and attempt of a checkpoint; the highest in tuple order is the newest."""

    step: int
    attempt: int


def save_checkpoint(
    state: TrainingState, url: str, *, attempt: int, keep_last: int, keep_every_steps: int = 0
) -> str:
    """Writes a checkpoint and removes older ones; to be called on rank 0 only.

    The newest `keep_last` checkpoints up to this step are kept, and those of every
    `keep_every_steps` steps. Checkpoints of later steps are removed too: training resumed before
    them, because they did not verify or were written by an attempt that was thought dead.
    Checkpoints of later attempts are never touched.

    Args:
        state: read, not changed.
        url: folder of all checkpoints of this run.
        attempt: number of this start of the training: 0 at first, then one more than that of the
            checkpoint it resumed from.
        keep_last: newest checkpoints to keep, this one included; > 0.
        keep_every_steps: checkpoints of steps that are multiples of this are kept for good; 0
            keeps none.

    Returns:
        The URL of the checkpoint.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    data = file.getvalue()
    manifest = {
        "format": _FORMAT,
        "step": state.step,
        "attempt": attempt,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "data_digest": state.data_digest,
        "config": state.params,
    }
    saved = _CheckpointId(state.step, attempt)
    checkpoint = join_url(url, _folder_name(saved))
    write_bytes(join_url(checkpoint, _STATE), data)
    # last: a process that is killed before this line leaves no checkpoint, instead of a damaged one
    write_bytes(join_url(checkpoint, _MANIFEST), json.dumps(manifest, indent=1).encode())
    _prune(url, saved, keep_last, keep_every_steps)
    return checkpoint


def newest_checkpoint(url: str) -> str | None:
    """The URL of the newest checkpoint that verifies, or None if none was ever completed.

    Checkpoints that do not verify are skipped with a warning.

    Raises:
        CheckpointError: there are checkpoints, but none verifies.
        StorageError: the storage does not answer; no checkpoint is skipped for that.
    """
    skipped: list[str] = []
    for candidate in sorted(_checkpoints(url), reverse=True):
        checkpoint = join_url(url, _folder_name(candidate))
        if _MANIFEST not in list_names(checkpoint):
            logger.warning("event=checkpoint_incomplete url=%s", checkpoint)
            continue
        try:
            _read_state(checkpoint, _read_manifest(checkpoint))
        except CheckpointError as error:
            logger.warning("event=checkpoint_skipped %s", error)
            skipped.append(str(error))
        else:
            return checkpoint
    if skipped:
        raise CheckpointError(
            f"{url}: none of its {len(skipped)} checkpoints verifies (the newest: {skipped[0]}); "
            "restore one, or start a fresh run: this one will not restart from step 0 by itself"
        )
    return None


def attempt_of(url: str) -> int:
    """The number of the attempt that wrote a checkpoint.

    Raises:
        CheckpointError: the URL is not named like a checkpoint.
    """
    match = _FOLDER.fullmatch(url.rstrip("/").rsplit("/", 1)[-1])
    if match is None:
        raise CheckpointError(
            f"{url}: not a checkpoint; its folder would be named like step_00000100_a0"
        )
    return int(match[2])


def resume_newest(url: str, state: TrainingState) -> int:
    """Loads the newest checkpoint below a URL, the same one on all ranks; every rank must call it.

    Returns:
        The number of this attempt: 0 if there is no checkpoint; the state is then unchanged.

    Raises:
        CheckpointError: there are checkpoints, but none verifies, or the newest that does is of
            another config or other data.
    """
    # rank 0 chooses: ranks that list the folder by themselves may see different checkpoints
    newest = broadcast_object(newest_checkpoint(url) if rank() == 0 else None)
    if newest is None:
        return 0
    load_checkpoint(newest, state)
    logger.info("resumed from step %d (%s)", state.step, newest)
    return attempt_of(newest) + 1


def load_checkpoint(url: str, state: TrainingState) -> None:
    """Loads a checkpoint into a state built from the same config, on the state's device.

    Raises:
        CheckpointError: it does not verify, or is of another config or other data; the state is
            then unchanged.
    """
    manifest = _read_manifest(url)
    difference = config_difference(manifest["config"], state.params)
    if difference:
        raise CheckpointError(
            f"{url}: is of another config ({'; '.join(difference)}); "
            "go back to its settings or start a fresh run"
        )
    state.load_state_dict(_load_state(url, manifest))


def is_checkpoint(url: str) -> bool:
    """True if the URL is named like a checkpoint's folder; the storage is not read."""
    return _FOLDER.fullmatch(url.rstrip("/").rsplit("/", 1)[-1]) is not None


def load_method(url: str) -> SavedMethod:
    """Reads the method's part of a checkpoint, on the CPU.

    Raises:
        CheckpointError: the checkpoint does not verify.
    """
    manifest = _read_manifest(url)
    saved = _load_state(url, manifest)
    params = manifest["config"]
    encoder = EncoderConfig(
        architecture=params["pretrain.encoder.architecture"],
        stem=params["pretrain.encoder.stem"],
        shortcuts=params.get("pretrain.encoder.shortcuts") != "False",
    )
    epoch = 0 if saved["position"] is None else saved["position"][0] + 1
    return SavedMethod(encoder, epoch, saved["model"])


def _folder_name(checkpoint: _CheckpointId) -> str:
    return f"step_{checkpoint.step:08d}_a{checkpoint.attempt}"


def _checkpoints(url: str) -> list[_CheckpointId]:
    """All checkpoint folders below a URL, whether complete or not, in no order."""
    matches = [_FOLDER.fullmatch(name) for name in list_names(url)]
    return [_CheckpointId(int(match[1]), int(match[2])) for match in matches if match]


def _prune(url: str, saved: _CheckpointId, keep_last: int, keep_every_steps: int) -> None:
    """Removes what `save_checkpoint` does not keep, given the checkpoint just saved."""
    removable = {each for each in _checkpoints(url) if each.attempt <= saved.attempt}
    complete = []
    for each in sorted(removable):
        if each <= saved and _MANIFEST in list_names(join_url(url, _folder_name(each))):
            complete.append(each)
    keep = set(complete[-keep_last:])
    if keep_every_steps:
        keep |= {each for each in complete if each.step % keep_every_steps == 0}
    for each in removable - keep:
        folder = join_url(url, _folder_name(each))
        # the manifest first: a folder that is half removed must look incomplete, not damaged
        remove(join_url(folder, _MANIFEST))
        remove(folder)


def _read_manifest(url: str) -> dict[str, Any]:
    text = read_bytes(join_url(url, _MANIFEST))
    try:
        manifest: dict[str, Any] = json.loads(text)
        known = manifest["format"] == _FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{url}: {_MANIFEST} is damaged") from error
    if not known:
        raise CheckpointError(
            f"{url}: its format is {manifest['format']}, this version reads {_FORMAT}"
        )
    return manifest


def _read_state(url: str, manifest: dict[str, Any]) -> bytes:
    if _STATE not in list_names(url):
        raise CheckpointError(f"{url}: {_STATE} is missing")
    data = read_bytes(join_url(url, _STATE))
    if hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise CheckpointError(
            f"{url}: {_STATE} is damaged: its {len(data)} bytes are not the "
            f"{manifest.get('bytes')} written"
        )
    return data


def _load_state(url: str, manifest: dict[str, Any]) -> dict[str, Any]:
    data = _read_state(url, manifest)
    try:
        # weights_only: torch.load would otherwise run code that a file contains
        # (tests/unit/train/test_checkpoint.py, test_code_in_a_checkpoint_is_not_run)
        saved: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(
            f"{url}: {_STATE} holds more than tensors and plain values; it was not run"
        ) from error
    return saved
