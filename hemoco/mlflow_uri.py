"""The URI of MLflow: which are allowed, and how it is shown. mlflow itself is not needed for it."""

import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hemoco.errors import TrackingError

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
                raise TrackingError(f"{shown(uri)}: {error}; correct MLFLOW_TRACKING_URI or HEMOCO_HOME") from error


def database(uri: str) -> Path:
    """The file of a sqlite:/// URI."""
    return Path(unquote(uri.removeprefix("sqlite:///")))


def shown(uri: str) -> str:
    """The URI without user and password, wherever they stand in it."""
    host = urlsplit(uri).netloc
    uri = uri.partition("?")[0]
    return uri.replace(host, host.rpartition("@")[2], 1) if host else uri
