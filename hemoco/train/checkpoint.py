"""Checkpoints of a training: written, found, verified, loaded and pruned.

A checkpoint is a folder `step_00000100_a1` (optimiser steps done, attempt) with `state.pt` and `manifest.json`. The
manifest is written last and holds the state's SHA-256: without it, or where they disagree, there is no checkpoint.
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
    """What a checkpoint holds of a method, without optimiser and stream."""

    encoder: EncoderConfig
    """Of its initialisation only the defaults."""
    epoch: int
    """Epochs begun."""
    tensors: dict[str, torch.Tensor]


class _Place(NamedTuple):
    """Orders checkpoints: the last is the newest."""

    step: int
    attempt: int


def save_checkpoint(
    state: TrainingState, url: str, *, attempt: int, keep_last: int, keep_every_steps: int = 0
) -> str:
    """Writes a checkpoint, then removes what it makes superfluous. On rank 0 only.

    Kept are the newest `keep_last` up to this step and those of every `keep_every_steps`. Removed with the others are
    those of later steps: this training went on from before them, because they did not verify or a stale attempt wrote
    them. What a later attempt wrote is never touched.

    Args:
        state: read, not changed.
        url: folder of all checkpoints of this training.
        attempt: number of this start of the training; 0, then one more than that of the checkpoint it resumed from.
        keep_last: newest checkpoints kept, this one included, > 0.
        keep_every_steps: checkpoints of steps that are multiples of it are kept, too; 0: none.

    Returns:
        The checkpoint's URL.
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
    place = _Place(state.step, attempt)
    checkpoint = join_url(url, _folder_name(place))
    write_bytes(join_url(checkpoint, _STATE), data)
    write_bytes(join_url(checkpoint, _MANIFEST), json.dumps(manifest, indent=1).encode())
    _prune(url, place, keep_last, keep_every_steps)
    return checkpoint


def newest_checkpoint(url: str) -> str | None:
    """The URL of the newest checkpoint that verifies; None where none was ever completed.

    Those that do not verify are skipped with a warning.

    Raises:
        CheckpointError: there are checkpoints, but none verifies.
        StorageError: the storage does not answer, which is no reason to skip a checkpoint.
    """
    skipped: list[str] = []
    for place in sorted(_places(url), reverse=True):
        checkpoint = join_url(url, _folder_name(place))
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
    """The attempt that wrote the checkpoint."""
    found = _FOLDER.fullmatch(url.rstrip("/").rsplit("/", 1)[-1])
    if found is None:
        raise CheckpointError(
            f"{url}: not a checkpoint; its folder would be named like step_00000100_a0"
        )
    return int(found[2])


def resume_newest(url: str, state: TrainingState) -> int:
    """Loads the newest checkpoint below a URL on all ranks, the same one, and returns this attempt's number.

    Without one the state stays as it is, and the attempt is 0. Every rank must call it.

    Raises:
        CheckpointError: there are checkpoints, but none verifies, or it is of another config or other data.
    """
    found = broadcast_object(newest_checkpoint(url) if rank() == 0 else None)
    if found is None:
        return 0
    load_checkpoint(found, state)
    logger.info("resumed from step %d (%s)", state.step, found)
    return attempt_of(found) + 1


def load_checkpoint(url: str, state: TrainingState) -> None:
    """Takes a checkpoint over into a state built from the same config, on its device.

    Raises:
        CheckpointError: it does not verify, or is of another config or other data; the state is then unchanged.
    """
    manifest = _read_manifest(url)
    difference = config_difference(manifest["config"], state.params)
    if difference:
        raise CheckpointError(
            f"{url}: is of another config ({'; '.join(difference)}); go back to its settings or start a fresh run"
        )
    state.load_state_dict(_load_state(url, manifest))


def is_checkpoint(url: str) -> bool:
    """Whether the URL is named like a checkpoint's folder."""
    return _FOLDER.fullmatch(url.rstrip("/").rsplit("/", 1)[-1]) is not None


def load_method(url: str) -> SavedMethod:
    """The method's part of a checkpoint, on the CPU.

    Raises:
        CheckpointError: it does not verify.
    """
    manifest = _read_manifest(url)
    saved = _load_state(url, manifest)
    named = manifest["config"]
    encoder = EncoderConfig(
        architecture=named["pretrain.encoder.architecture"],
        stem=named["pretrain.encoder.stem"],
        shortcuts=named.get("pretrain.encoder.shortcuts") != "False",
    )
    epoch = 0 if saved["position"] is None else saved["position"][0] + 1
    return SavedMethod(encoder, epoch, saved["model"])


def _folder_name(place: _Place) -> str:
    return f"step_{place.step:08d}_a{place.attempt}"


def _places(url: str) -> list[_Place]:
    found = (_FOLDER.fullmatch(name) for name in list_names(url))
    return [_Place(int(match[1]), int(match[2])) for match in found if match]


def _prune(url: str, saved: _Place, keep_last: int, keep_every_steps: int) -> None:
    mine = [place for place in _places(url) if place.attempt <= saved.attempt]
    complete = [
        p for p in mine if p <= saved and _MANIFEST in list_names(join_url(url, _folder_name(p)))
    ]
    for_good = {p for p in complete if keep_every_steps and p.step % keep_every_steps == 0}
    for place in set(mine) - set(sorted(complete)[-keep_last:]) - for_good:
        checkpoint = join_url(url, _folder_name(place))
        # the manifest first: half removed, it must not look damaged but incomplete
        remove(join_url(checkpoint, _MANIFEST))
        remove(checkpoint)


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
            f"{url}: {_STATE} is damaged: its {len(data)} bytes are not the {manifest.get('bytes')} written"
        )
    return data


def _load_state(url: str, manifest: dict[str, Any]) -> dict[str, Any]:
    data = _read_state(url, manifest)
    try:
        # weights_only: a checkpoint may hold tensors and plain values, never code
        saved: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(
            f"{url}: {_STATE} holds more than tensors and plain values; it was not run"
        ) from error
    return saved
