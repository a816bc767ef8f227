"""The connection to MLflow: its URI, its client, retries, and what its errors mean.

mlflow is imported inside functions, since that takes seconds (see also `client_type`).
"""

import contextlib
import dataclasses
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from hemoco.errors import RefusedError, TrackingError, first_line
from hemoco.storage.objects import home
from hemoco.storage.retry import RetryPolicy, retrying

Answer = TypeVar("Answer")

EXPERIMENT = "hemoco"
"""Name of the experiment of all runs."""

# without this tag MLflow's page of the experiment opens on evaluations of agents
_KIND_TAG, _KIND = "mlflow.experimentKind", "custom_model_development"

_ENVIRONMENT = {
    # MLflow itself retries 7 times with back-off, which blocks for minutes; `ask` retries instead
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}

# MLflow would give the same answer again
_FINAL_ERRORS = (
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)

_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")


def tracking_uri() -> str:
    """`$MLFLOW_TRACKING_URI`; by default, SQLite below `home()`.

    The path of a SQLite file is made absolute, because Ray's workers run in other folders.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
    return f"sqlite:///{database(uri).resolve()}" if uri.startswith("sqlite:///") else uri


def connect(uri: str) -> str:
    """Checks that MLflow answers, and finds or creates the experiment `hemoco`.

    Returns:
        The id of the experiment.

    Raises:
        TrackingError: the URI is not of a supported kind, MLflow does not answer, or the experiment
            was deleted.
    """
    check_uri(uri)
    local = uri.startswith("sqlite:")
    # a file may be locked for a moment; a server that does not answer now is probably not running
    patience_s = 30.0 if local else 0.0
    experiment = ask(
        uri, lambda client: client.get_experiment_by_name(EXPERIMENT), patience_s=patience_s
    )
    if experiment is None:
        folder = (database(uri).parent / "mlartifacts").as_uri() if local else None
        try:
            tags = {_KIND_TAG: _KIND}
            return str(ask(uri, lambda client: client.create_experiment(EXPERIMENT, folder, tags)))
        except TrackingError:
            # another process may have created it in the meantime
            experiment = ask(uri, lambda client: client.get_experiment_by_name(EXPERIMENT))
            if experiment is None:
                raise
    experiment_id = str(experiment.experiment_id)
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {EXPERIMENT!r} was deleted in MLflow at {shown(uri)}: restore it with "
            f"`mlflow experiments restore --experiment-id {experiment_id}`"
        )
    if _KIND_TAG not in experiment.tags:  # created by an older version
        # suppressed, as a user may have no write access; the page is then MLflow's default
        with contextlib.suppress(TrackingError):
            ask(
                uri,
                lambda client: client.set_experiment_tag(experiment_id, _KIND_TAG, _KIND),
                patience_s=0,
            )
    return experiment_id


def ask(uri: str, question: Callable[[Any], Answer], *, patience_s: float = 60.0) -> Answer:
    """Calls a function with an MLflow client, again after transient faults; returns its result.

    Transient are a restarting server or a locked database, for example. The function may be called
    several times, so it must be idempotent.

    Args:
        uri: URI of the tracking server.
        question: gets an MlflowClient.
        patience_s: seconds after which no new attempt begins.

    Raises:
        RefusedError: MLflow answered, and would give the same answer again.
        TrackingError: MLflow did not answer in time.
    """
    client = client_type()
    from mlflow.exceptions import MlflowException

    policy = dataclasses.replace(_RETRIES, budget_s=patience_s)
    try:
        return retrying(policy)(lambda: question(client(tracking_uri=uri)))
    except MlflowException as error:
        raise _tracking_error(uri, error) from error


def _is_transient(error: BaseException) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code not in _FINAL_ERRORS


_RETRIES = RetryPolicy(is_transient=_is_transient, first_wait_s=0.4, longest_wait_s=16.0)


def client_type() -> Any:
    """The class MlflowClient.

    mlflow reads its environment variables when it is imported and when it is used, so the defaults
    of `_ENVIRONMENT` are set before; values that the user has set are not changed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient


def _tracking_error(uri: str, error: Exception) -> TrackingError:
    """MLflow's exception as an error of ours, with what to do about it."""
    reason = first_line(error)
    if "Max retries exceeded" in str(error) or "timed out" in str(error):
        reason = "it does not answer"
    advice = "start the server or correct MLFLOW_TRACKING_URI (unset: SQLite in $HEMOCO_HOME)"
    code = getattr(error, "error_code", "")
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        advice = (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    elif "'active' state" in reason:
        advice = "it was deleted, `mlflow runs restore --run-id` brings it back"
    kind = RefusedError if code in _FINAL_ERRORS else TrackingError
    return kind(f"MLflow at {shown(uri)}: {reason}; {advice}")


def check_uri(uri: str) -> None:
    """Refuses a URI that MLflow would misread, or would try for minutes to open.

    Raises:
        TrackingError: the scheme is none of MLflow's servers and databases, or the SQLite file
            cannot be opened.
    """
    if urlsplit(uri).scheme.partition("+")[0] not in _SCHEMES:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI is {shown(uri)}: use http(s)://HOST:PORT of an MLflow server, "
            "sqlite:////ABSOLUTE/PATH.db, or unset it for SQLite in $HEMOCO_HOME"
        )
    if uri.startswith("sqlite:"):
        path = database(uri)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sqlite3.connect(path).execute("pragma schema_version").connection.close()
        except (OSError, sqlite3.DatabaseError) as error:
            # a locked file is in use, hence a database
            if "locked" not in str(error):
                raise TrackingError(
                    f"{shown(uri)}: {error}; correct MLFLOW_TRACKING_URI or HEMOCO_HOME"
                ) from error


def database(uri: str) -> Path:
    """The file of a sqlite:/// URI."""
    return Path(unquote(uri.removeprefix("sqlite:///")))


def shown(uri: str) -> str:
    """The URI as it may be shown: without user and password, and without its query."""
    host = urlsplit(uri).netloc
    uri = uri.partition("?")[0]
    return uri.replace(host, host.rpartition("@")[2], 1) if host else uri
