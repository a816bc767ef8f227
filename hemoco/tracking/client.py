"""The connection to MLflow: its URI, its client, and how its errors are told apart."""

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


_KIND = {
    "mlflow.experimentKind": "custom_model_development"
}  # else MLflow's pages open on evaluations of agents


_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow's own 7 with back-off block for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


# asking again would give the same answer
_FINAL_ERRORS = (
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)


def tracking_uri() -> str:
    """`$MLFLOW_TRACKING_URI`, default SQLite below `home()`; absolute, because workers run in other folders."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
    return f"sqlite:///{database(uri).resolve()}" if uri.startswith("sqlite:///") else uri


def connect(uri: str) -> str:
    """Checks that MLflow answers, and finds or creates the experiment `hemoco`.

    Returns:
        The experiment's id.

    Raises:
        TrackingError: the URI is of a wrong kind, nothing answers there, or the experiment was deleted.
    """
    check_uri(uri)
    local = uri.startswith("sqlite:")
    patience_s = (
        30.0 if local else 0.0
    )  # a file may be locked for a moment; a server that is not there stays away
    found = ask(
        uri, lambda client: client.get_experiment_by_name(EXPERIMENT), patience_s=patience_s
    )
    if found is None:
        folder = (database(uri).parent / "mlartifacts").as_uri() if local else None
        try:
            return str(ask(uri, lambda client: client.create_experiment(EXPERIMENT, folder, _KIND)))
        except TrackingError:
            # another process may have created it in between
            found = ask(uri, lambda client: client.get_experiment_by_name(EXPERIMENT))
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {EXPERIMENT!r} was deleted in MLflow at {shown(uri)}: restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    if "mlflow.experimentKind" not in found.tags:  # made by an older version
        with contextlib.suppress(TrackingError):  # who may only read sees it as it was
            tags = _KIND.items()
            ask(
                uri,
                lambda client: [
                    client.set_experiment_tag(found.experiment_id, *tag) for tag in tags
                ],
                patience_s=0,
            )
    return str(found.experiment_id)


def ask(uri: str, question: Callable[[Any], Answer], *, patience_s: float = 60.0) -> Answer:
    """Asks MLflow, again and again for a while where that can help: server restarting, database locked.

    Args:
        uri: of MLflow.
        question: gets an MlflowClient.
        patience_s: after that time no new attempt begins.

    Raises:
        TrackingError: no answer in time, or a refusal (RefusedError).
    """
    client = client_type()
    from mlflow.exceptions import MlflowException

    policy = dataclasses.replace(_RETRIES, budget_s=patience_s)
    try:
        return retrying(policy)(lambda: question(client(tracking_uri=uri)))
    except MlflowException as error:
        raise _refusal(uri, error) from error


def _is_transient(error: BaseException) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code not in _FINAL_ERRORS


_RETRIES = RetryPolicy(is_transient=_is_transient, first_wait_s=0.4, longest_wait_s=16.0)


def client_type() -> Any:
    """MlflowClient, imported with our defaults in the environment; the user's own values win."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient


def _refusal(uri: str, error: Exception) -> TrackingError:
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


_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")


def check_uri(uri: str) -> None:
    """Refuses what MLflow would take for something else, or try for minutes to open.

    Raises:
        TrackingError: the scheme is none of MLflow's servers and databases, or the SQLite file cannot be opened.
    """
    if urlsplit(uri).scheme.partition("+")[0] not in _SCHEMES:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI is {shown(uri)}: use http(s)://HOST:PORT of an MLflow server, sqlite:////ABSOLUTE/"
            "PATH.db, or unset it for SQLite in $HEMOCO_HOME"
        )
    if uri.startswith("sqlite:"):
        path = database(uri)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sqlite3.connect(path).execute("pragma schema_version").connection.close()
        except (OSError, sqlite3.DatabaseError) as error:
            if "locked" not in str(error):
                raise TrackingError(
                    f"{shown(uri)}: {error}; correct MLFLOW_TRACKING_URI or HEMOCO_HOME"
                ) from error


def database(uri: str) -> Path:
    """The file of a sqlite:/// URI."""
    return Path(unquote(uri.removeprefix("sqlite:///")))


def shown(uri: str) -> str:
    """The URI without user and password, wherever they stand in it."""
    host = urlsplit(uri).netloc
    uri = uri.partition("?")[0]
    return uri.replace(host, host.rpartition("@")[2], 1) if host else uri
