"""The door to MLflow's models: a backbone is a logged model with its file, registered under a name, and read again.

A logged model also shows the results of all transfers from it, each with the data it was measured on. It is found by
the SHA-256 of the backbone's file: the same file is the same model, whoever names it and however often it is recorded.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from hemoco.errors import CheckpointError, RefusedError, TrackingError, first_line
from hemoco.storage.objects import read_bytes
from hemoco.tracking.client import ask
from hemoco.tracking.runs import DIGEST_LENGTH
from hemoco.tracking.tags import Tag

MODEL_TYPE = "moco-backbone"
SNAPSHOT_TYPE = "moco-backbone-snapshot"
"""Of a backbone that was exported in mid-pretraining: only its URL is recorded, the file stays where it is."""
BACKBONE_FILE, ABOUT_FILE = "backbone.safetensors", "backbone.json"
SCHEME = "models:/"
_SHA256, _URL = "hemoco.sha256", Tag.BACKBONE_URL
VERSIONS = "mlflow.modelVersions"
"""Tag by which MLflow's page of a logged model shows the versions it is registered as."""
_UPLOAD_S = 300  # a server answers when it has passed the whole file on


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneRecord:
    """What MLflow is to know of a backbone beside its file."""

    name: str
    """Shown in the list of models."""
    run_id: str
    """Of its pretraining, whose output it becomes; empty where this MLflow does not have that run."""
    step: int
    """Epochs of its pretraining; 0 where nobody knows."""
    params: dict[str, str]
    tags: dict[str, str]
    about: dict[str, str]
    """The metadata of its file."""


class Measured(NamedTuple):
    """The headline result of a transfer from one backbone."""

    key: str
    """TRANSFER/METRIC."""
    value: float
    step: int
    model_id: str


class Data(NamedTuple):
    """A data set, as it was named when it was recorded as a run's input."""

    name: str
    digest: str


def record_backbone(uri: str, experiment_id: str, url: str, record: BackboneRecord) -> str:
    """Makes the backbone at a URL a logged model with its file, unless there is one with this very file.

    Returns:
        The model's id.

    Raises:
        StorageError: the file cannot be read.
        TrackingError: MLflow cannot be used; the same call again goes on.
    """
    data = read_bytes(url)
    sha256 = hashlib.sha256(data).hexdigest()
    tags = record.tags | {_SHA256: sha256, _URL: url}
    model = ask(
        uri,
        lambda client: _find_or_create(
            client, experiment_id, MODEL_TYPE, {_SHA256: sha256}, record, tags
        ),
    )
    if str(model.status) != "READY":  # new, or left by an attempt that was killed while it uploaded
        _upload(uri, model.model_id, {BACKBONE_FILE: data, ABOUT_FILE: _about(record, sha256, url)})
        ask(uri, lambda client: client.finalize_logged_model(model.model_id, "READY"))
    if record.run_id:
        _add_output(uri, record.run_id, model.model_id, record.step)
    return str(model.model_id)


def record_snapshot(uri: str, experiment_id: str, url: str, record: BackboneRecord) -> str:
    """As `record_backbone`, for a backbone of mid-pretraining: found by its URL and pretraining, and not uploaded."""
    tags, identity = record.tags | {_URL: url}, {_URL: url, Tag.PRETRAIN_RUN_ID: record.run_id}
    found = ask(
        uri,
        lambda client: _find_or_create(
            client, experiment_id, SNAPSHOT_TYPE, identity, record, tags | identity
        ),
    )
    ask(uri, lambda client: client.finalize_logged_model(found.model_id, "READY"))
    _add_output(uri, record.run_id, found.model_id, record.step)
    return str(found.model_id)


def register_version(uri: str, model_id: str, name: str, alias: str, tags: dict[str, str]) -> str:
    """Makes a logged model a version of a registered model, once: one that was deleted since is not made again.

    Args:
        uri: of MLflow.
        model_id: of the logged model.
        name: of the registered model, as `models_name` makes it.
        alias: of the version, as `alias_name` makes it; an older version loses it.
        tags: of the version.

    Returns:
        The version's number.
    """
    model = ask(uri, lambda client: client.get_logged_model(model_id))
    if Tag.REGISTERED in model.tags:
        return str(model.tags[Tag.REGISTERED]).rpartition("/")[2]
    with contextlib.suppress(
        RefusedError
    ):  # there is one already; another reason stops the next call
        ask(uri, lambda client: client.create_registered_model(name))
    # a database asks MLflow's global URI for models:/..., which need not be ours
    source = f"{SCHEME}{model_id}" if uri.startswith("http") else model.artifact_location

    def version(client: Any) -> str:
        # an attempt that was killed, or whose answer was lost, may have made it
        known = client.search_model_versions(
            f"name = '{name}' and tags.`{Tag.MODEL_ID}` = '{model_id}'"
        )
        made = known or [
            client.create_model_version(
                name,
                source,
                run_id=model.source_run_id,
                model_id=model_id,
                tags=tags | {Tag.MODEL_ID: model_id},
            )
        ]
        return str(made[0].version)

    number = ask(uri, version)
    ask(uri, lambda client: client.set_registered_model_alias(name, alias, number))
    shown = json.dumps([{"name": name, "version": number}])
    ask(
        uri,
        lambda client: client.set_logged_model_tags(
            model_id, {VERSIONS: shown, Tag.REGISTERED: f"{name}/{number}"}
        ),
    )
    return number


def models_name(recipe: str) -> str:
    """Of the registered model whose versions are the backbones of one recipe."""
    return f"hemoco-{re.sub('[^A-Za-z0-9_.=+-]', '-', recipe)}"


def alias_name(run: str) -> str:
    """The alias that stands for a run: its name, with `-` for what MLflow does not allow there."""
    alias = re.sub(r"[^A-Za-z0-9_-]", "-", run)[:255]
    reserved = re.fullmatch(r"(?i)latest|v\d+", alias)
    return f"run-{alias}" if reserved else alias


def link_models(uri: str, run_id: str, model_ids: Iterable[str]) -> None:
    """Records which backbones a run started from; again does no harm."""
    from mlflow.entities import LoggedModelInput

    inputs = [LoggedModelInput(model_id) for model_id in dict.fromkeys(model_ids)]
    if inputs:
        ask(uri, lambda client: client.log_inputs(run_id, models=inputs))


def log_results(uri: str, run_id: str, results: list[Measured], data: Data) -> None:
    """Records results of a run on the models they were measured from, too.

    Of several models with the same key, the run itself shows the last one's.
    """
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    place = {
        "dataset_name": data.name,
        "dataset_digest": data.digest[:DIGEST_LENGTH],
        "run_id": run_id,
    }
    metrics = [
        Metric(
            result.key, result.value, now + order, result.step, model_id=result.model_id, **place
        )
        for order, result in enumerate(results)
    ]
    if metrics:
        ask(uri, lambda client: client.log_batch(run_id, metrics=metrics))


def read_model_file(uri: str, model_id: str) -> bytes:
    """The file backbone.safetensors of a logged model.

    Raises:
        CheckpointError: MLflow's file is not the one that was recorded.
        StorageError: the file of a snapshot, which is not in MLflow, cannot be read.
        TrackingError: MLflow has no such model, or cannot be used.
    """
    model = ask(uri, lambda client: client.get_logged_model(model_id))
    if model.model_type == SNAPSHOT_TYPE:
        return read_bytes(model.tags[_URL])
    data = _download(uri, model_id, f"{model.artifact_location}/{BACKBONE_FILE}")
    if hashlib.sha256(data).hexdigest() != model.tags.get(_SHA256):
        raise CheckpointError(
            f"{SCHEME}{model_id}: its file in MLflow is not the one that was recorded; restore it"
        )
    return data


def _find_or_create(
    client: Any,
    experiment_id: str,
    kind: str,
    identity: dict[str, str],
    record: BackboneRecord,
    tags: dict[str, str],
) -> Any:
    """One question, so that asking again after a lost answer makes no second model."""
    wanted = [
        f"model_type = '{kind}'",
        *(f"tags.`{key}` = '{value}'" for key, value in identity.items()),
    ]
    found = client.search_logged_models([experiment_id], " AND ".join(wanted))
    if found:
        return min(
            found, key=lambda model: (str(model.status) != "READY", model.creation_timestamp)
        )
    return client.create_logged_model(
        experiment_id,
        name=re.sub(r"[^\w@=+-]", "-", record.name),
        source_run_id=record.run_id or None,
        tags=tags,
        params=record.params,
        model_type=kind,
    )


def _about(record: BackboneRecord, sha256: str, url: str) -> bytes:
    """How to use the file without hemoco."""
    load = "hemoco.load_backbone"
    if record.about.get("stem") == "imagenet" and record.about.get("shortcuts", "true") == "true":
        read = f"safetensors.torch.load_file('{BACKBONE_FILE}')"
        load = f"timm.create_model('{record.about['architecture']}', num_classes=0).load_state_dict({read})"
    images = "RGB in [0, 1], minus mean, divided by std, per channel"
    content = record.about | {"sha256": sha256, "url": url, "load": load, "images": images}
    return json.dumps(content, indent=1).encode()


def _upload(uri: str, model_id: str, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder, _patience():
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        try:
            ask(uri, lambda client: client.log_model_artifacts(model_id, folder))
        except OSError as error:  # the server's answer about its own storage
            reason = _reason(uri, error)
            raise TrackingError(
                f"MLflow cannot store the backbone ({reason}); check its artifact storage"
            ) from error


def _download(uri: str, model_id: str, location: str) -> bytes:
    from mlflow.artifacts import download_artifacts

    words = {"artifact_uri": location, "tracking_uri": uri}
    with tempfile.TemporaryDirectory() as folder, _patience():
        try:
            found = ask(uri, lambda _: download_artifacts(dst_path=folder, **words), patience_s=10)
            return Path(found).read_bytes()
        except OSError as error:
            raise TrackingError(
                f"{SCHEME}{model_id}: MLflow does not give its file ({_reason(uri, error)}); check its artifact storage"
            ) from error


def _reason(uri: str, error: OSError) -> str:
    """What an error says, without user and password, which may stand in the URLs that it names."""
    host = urlsplit(uri).netloc
    return first_line(error).replace(host, host.rpartition("@")[2]) if host else first_line(error)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Lets MLflow's server take its time for a large file."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(max(int(before or 0), _UPLOAD_S))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _add_output(uri: str, run_id: str, model_id: str, step: int) -> None:
    from mlflow.entities import LoggedModelOutput

    def add(client: Any) -> None:
        known = client.get_run(run_id).outputs
        if model_id not in [output.model_id for output in (known.model_outputs if known else [])]:
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])

    ask(uri, add)
