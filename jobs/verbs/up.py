"""`python -m jobs up`: S3, MLflow and Ray on this machine, in the foreground, for development."""

import contextlib
import fcntl
import os
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import tyro

from cluster.local.ray import Stack, development_stack, ray_logs
from hemoco.errors import HemocoError
from hemoco.storage.objects import home

_CHECK_S = 1.0


def main(argv: list[str]) -> None:
    """Runs the stack."""
    tyro.cli(up, args=argv, prog="python -m jobs up")


def up(*, folder: str = "", s3_port: int = 0, mlflow_port: int = 0) -> None:
    """S3, MLflow and Ray on loopback until Ctrl-C; prints the export lines for another terminal.

    The keys of S3 are new at each start; the data stays in the folder.

    Args:
        folder: where everything lies; default: $HEMOCO_HOME/stack.
        s3_port: 0 takes a free one.
        mlflow_port: 0 takes a free one.
    """
    place = Path(folder).expanduser().resolve() if folder else home() / "stack"
    os.environ.pop(
        "RAY_ADDRESS", None
    )  # from an earlier stack, in a terminal that took its export lines
    _stop_on_sigterm()
    try:
        with (
            _locked(place),
            development_stack(place, s3_port=s3_port, mlflow_port=mlflow_port) as stack,
        ):
            _stop_on_sigterm()  # Ray has put its own handler there
            print(_instructions(stack, place), flush=True)
            while True:
                stack.check()
                time.sleep(_CHECK_S)
    except KeyboardInterrupt:
        print("# stopped", flush=True)


def _instructions(stack: Stack, folder: Path) -> str:
    """Where everything is; a shell can read it, all but the export lines is comment."""
    return "\n".join(
        [
            f"# S3       {stack.s3.endpoint}  bucket s3://hemoco  in {folder / 's3'}",
            f"# MLflow   {stack.mlflow.uri}  in {folder / 'mlflow'}",
            f"# Ray      {stack.ray_address}  logs in {ray_logs()}",
            "# In another terminal:",
            *(f"export {name}={shlex.quote(value)}" for name, value in stack.exports().items()),
            "# Ctrl-C stops everything; the data stays.",
        ]
    )


def _stop_on_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the system lets it go when the process ends, however it ends.

    Raises:
        HemocoError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise HemocoError(
                f"{folder} is in use by process {lock.read().strip()}: stop it, or name another --folder"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
