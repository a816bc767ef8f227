"""Backbones as MLflow models: recording, registering, linking, and reading them.

A backbone is a logged model that holds its file. A logged model is identified by the SHA-256 of
that file: the same file is the same model, however often and under whatever name it is recorded.
In MLflow it shows the results of all transfers from it, with the data they were measured on.
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
"""Type of a backbone exported while pretraining runs: only its URL is recorded, not the file."""
BACKBONE_FILE, ABOUT_FILE = "backbone.safetensors", "backbone.json"
SCHEME = "models:/"
_SHA256, _URL = "hemoco.sha256", Tag.BACKBONE_URL
VERSIONS = "mlflow.modelVersions"
"""Tag from which MLflow's page of a logged model takes the versions it is registered as."""
_UPLOAD_S = 300
"""Time limit of a request with a file: the server answers once it has stored all of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneRecord:
    """Facts of a backbone that MLflow records with its file."""

    name: str
    """Name in the list of models."""
    run_id: str
    """Id of its pretraining run, whose output it becomes; empty if this MLflow has no such run."""
    step: int
    """Epochs of its pretraining; 0 if unknown."""
    params: dict[str, str]
    """Settings of its pretraining."""
    tags: dict[str, str]
    """Tags of the logged model."""
    about: dict[str, str]
    """Metadata of its file."""


class Measured(NamedTuple):
    """The headline result of a transfer from one backbone."""

    key: str
    """Name of the metric, TRANSFER/METRIC."""
    value: float
    step: int
    """Epochs of the backbone's pretraining."""
    model_id: str
    """Id of the backbone's logged model."""


class Data(NamedTuple):
    """A data set, named as when it was recorded as an input of a run."""

    name: str
    digest: str


def record_backbone(uri: str, experiment_id: str, url: str, record: BackboneRecord) -> str:
    """Records the backbone at a URL as a logged model with its file, unless it already is one.

    Returns:
        The id of the logged model.

    Raises:
        StorageError: the file cannot be read.
        TrackingError: MLflow cannot be used; the same call can be repeated and then completes it.
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
    if str(model.status) != "READY":  # new, or left by an attempt that was killed during the upload
        _upload(uri, model.model_id, {BACKBONE_FILE: data, ABOUT_FILE: _about(record, sha256, url)})
        ask(uri, lambda client: client.finalize_logged_model(model.model_id, "READY"))
    if record.run_id:
        _add_output(uri, record.run_id, model.model_id, record.step)
    return str(model.model_id)


def record_snapshot(uri: str, experiment_id: str, url: str, record: BackboneRecord) -> str:
    """Records a backbone that was exported while pretraining runs; its file is not uploaded.

    It is identified by its URL and its pretraining run.

    Returns:
        The id of the logged model.

    Raises:
        TrackingError: MLflow cannot be used; the same call can be repeated and then completes it.
    """
    identity = {_URL: url, Tag.PRETRAIN_RUN_ID: record.run_id}
    model = ask(
        uri,
        lambda client: _find_or_create(
            client, experiment_id, SNAPSHOT_TYPE, identity, record, record.tags | identity
        ),
    )
    ask(uri, lambda client: client.finalize_logged_model(model.model_id, "READY"))
    _add_output(uri, record.run_id, model.model_id, record.step)
    return str(model.model_id)


def register_version(uri: str, model_id: str, name: str, alias: str, tags: dict[str, str]) -> str:
    """Registers a logged model as a version of a registered model, once.

    A version that was deleted since is not created again.

    Args:
        uri: URI of the tracking server.
        model_id: id of the logged model.
        name: name of the registered model, from `models_name`.
        alias: alias of the version, from `alias_name`; an older version loses it.
        tags: tags that the version gets.

    Returns:
        The number of the version.

    Raises:
        TrackingError: MLflow cannot be used; the same call can be repeated and then completes it.
    """
    model = ask(uri, lambda client: client.get_logged_model(model_id))
    if Tag.REGISTERED in model.tags:
        return str(model.tags[Tag.REGISTERED]).rpartition("/")[2]
    # refused if the name exists already; if it is refused for another reason, so is the next call
    with contextlib.suppress(RefusedError):
        ask(uri, lambda client: client.create_registered_model(name))
    # with a database, MLflow would resolve models:/... at its global URI, which need not be ours
    source = f"{SCHEME}{model_id}" if uri.startswith("http") else model.artifact_location

    def find_or_create_version(client: Any) -> str:
        # an attempt that was killed, or whose answer was lost, may have created it
        query = f"name = '{name}' and tags.`{Tag.MODEL_ID}` = '{model_id}'"
        existing = client.search_model_versions(query)
        if existing:
            return str(existing[0].version)
        created = client.create_model_version(
            name,
            source,
            run_id=model.source_run_id,
            model_id=model_id,
            tags=tags | {Tag.MODEL_ID: model_id},
        )
        return str(created.version)

    number = ask(uri, find_or_create_version)
    ask(uri, lambda client: client.set_registered_model_alias(name, alias, number))
    model_tags = {
        VERSIONS: json.dumps([{"name": name, "version": number}]),
        Tag.REGISTERED: f"{name}/{number}",
    }
    ask(uri, lambda client: client.set_logged_model_tags(model_id, model_tags))
    return number


def models_name(recipe: str) -> str:
    """Name of the registered model whose versions are the backbones of one recipe."""
    return f"hemoco-{re.sub('[^A-Za-z0-9_.=+-]', '-', recipe)}"


def alias_name(run: str) -> str:
    """Alias of the version from a run: the run's name, with `-` for characters not allowed."""
    alias = re.sub(r"[^A-Za-z0-9_-]", "-", run)[:255]
    # MLflow refuses these as aliases
    reserved = re.fullmatch(r"(?i)latest|v\d+", alias)
    return f"run-{alias}" if reserved else alias


def link_models(uri: str, run_id: str, model_ids: Iterable[str]) -> None:
    """Records logged models as inputs of a run; a repeated call changes nothing."""
    from mlflow.entities import LoggedModelInput

    inputs = [LoggedModelInput(model_id) for model_id in dict.fromkeys(model_ids)]
    if inputs:
        ask(uri, lambda client: client.log_inputs(run_id, models=inputs))


def log_results(uri: str, run_id: str, results: list[Measured], data: Data) -> None:
    """Records results of a run, linked to the models they were measured on and to the data.

    If several results have the same key, the run itself shows the last one.
    """
    from mlflow.entities import Metric

    now_ms = time.time_ns() // 1_000_000
    metrics = [
        Metric(
            result.key,
            result.value,
            # of the points at one step, MLflow shows the one with the highest timestamp
            now_ms + order,
            result.step,
            model_id=result.model_id,
            dataset_name=data.name,
            dataset_digest=data.digest[:DIGEST_LENGTH],
            run_id=run_id,
        )
        for order, result in enumerate(results)
    ]
    if metrics:
        ask(uri, lambda client: client.log_batch(run_id, metrics=metrics))


def read_model_file(uri: str, model_id: str) -> bytes:
    """Contents of a logged model's file backbone.safetensors.

    Raises:
        CheckpointError: the file in MLflow is not the one that was recorded.
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
    """The logged model with these tags, created if there is none.

    Search and creation are one call of `ask`: repeated after a lost answer, it creates no second
    model. Two processes at the same time can; then the older one that is complete counts.

    Args:
        client: MLflow's client.
        experiment_id: id of the experiment.
        kind: model type.
        identity: tags that identify the model.
        record: facts for a new model.
        tags: all tags of a new model, `identity` included.
    """
    conditions = [f"model_type = '{kind}'"]
    conditions += [f"tags.`{key}` = '{value}'" for key, value in identity.items()]
    models = client.search_logged_models([experiment_id], " AND ".join(conditions))
    if models:
        return min(models, key=lambda m: (str(m.status) != "READY", m.creation_timestamp))
    return client.create_logged_model(
        experiment_id,
        name=re.sub(r"[^\w@=+-]", "-", record.name),
        source_run_id=record.run_id or None,
        tags=tags,
        params=record.params,
        model_type=kind,
    )


def _about(record: BackboneRecord, sha256: str, url: str) -> bytes:
    """A JSON file that explains how to use the backbone, where possible without hemoco."""
    load = "hemoco.load_backbone"
    # timm has neither the small stem nor plain networks
    if record.about.get("stem") == "imagenet" and record.about.get("shortcuts", "true") == "true":
        model = f"timm.create_model('{record.about['architecture']}', num_classes=0)"
        load = f"{model}.load_state_dict(safetensors.torch.load_file('{BACKBONE_FILE}'))"
    images = "RGB in [0, 1], minus mean, divided by std, per channel"
    content = record.about | {"sha256": sha256, "url": url, "load": load, "images": images}
    return json.dumps(content, indent=1).encode()


def _upload(uri: str, model_id: str, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder, _long_requests():
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        try:
            ask(uri, lambda client: client.log_model_artifacts(model_id, folder))
        except OSError as error:  # the server reports a failure of its artifact storage
            reason = _reason(uri, error)
            raise TrackingError(
                f"MLflow cannot store the backbone ({reason}); check its artifact storage"
            ) from error


def _download(uri: str, model_id: str, location: str) -> bytes:
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder, _long_requests():
        try:
            path = ask(
                uri,
                lambda _: download_artifacts(
                    artifact_uri=location, dst_path=folder, tracking_uri=uri
                ),
                patience_s=10,
            )
            return Path(path).read_bytes()
        except OSError as error:
            raise TrackingError(
                f"{SCHEME}{model_id}: MLflow does not give its file ({_reason(uri, error)}); "
                "check its artifact storage"
            ) from error


def _reason(uri: str, error: OSError) -> str:
    """First line of an error, without the user and password of the URLs that it may name."""
    reason = first_line(error)
    host = urlsplit(uri).netloc
    return reason.replace(host, host.rpartition("@")[2]) if host else reason


@contextlib.contextmanager
def _long_requests() -> Iterator[None]:
    """Raises the time limit of MLflow's requests in the block, for a large file."""
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
    """Records a logged model as an output of a run, unless it already is one."""
    from mlflow.entities import LoggedModelOutput

    def add(client: Any) -> None:
        outputs = client.get_run(run_id).outputs
        models = outputs.model_outputs if outputs else []
        if model_id not in [output.model_id for output in models]:
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])

    ask(uri, add)
