"""`python -m jobs up`: S3, MLflow and Ray on this machine, in the foreground, for development."""

import contextlib
import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.local.ray import Stack, development_stack, ray_logs
from hemoco.errors import HemocoError
from hemoco.storage.objects import home
from jobs.arguments import Folder, read_arguments
from jobs.session import take_sigterm_as_ctrl_c

_CHECK_S = 1.0


def main(argv: list[str]) -> None:
    """Runs the servers until Ctrl-C."""
    read_arguments(up, argv, command="up")


def up(*, folder: Folder = "", s3_port: int = 0, mlflow_port: int = 0) -> None:
    """Runs S3, MLflow and Ray on loopback until Ctrl-C.

    Prints the `export` lines by which another terminal uses them.

    The S3 keys are new at each start; the data stays in the folder.

    Args:
        folder: folder for all data; default: $HEMOCO_HOME/stack.
        s3_port: port of S3; 0 takes a free one.
        mlflow_port: port of MLflow; 0 takes a free one.
    """
    path = Path(folder).expanduser().resolve() if folder else home() / "stack"
    # set in a terminal that took the export lines of an earlier stack
    os.environ.pop("RAY_ADDRESS", None)
    take_sigterm_as_ctrl_c()
    try:
        with (
            _locked(path),
            development_stack(path, s3_port=s3_port, mlflow_port=mlflow_port) as stack,
        ):
            take_sigterm_as_ctrl_c()  # again: ray.init has installed its own handler
            print(_instructions(stack, path), flush=True)
            while True:
                stack.check()
                time.sleep(_CHECK_S)
    except KeyboardInterrupt:
        print("# stopped", flush=True)


def _instructions(stack: Stack, folder: Path) -> str:
    """Describes the servers as text that a shell can read: all but the exports is comment."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in stack.exports().items()]
    return "\n".join(
        [
            f"# S3       {stack.s3.endpoint}  bucket s3://hemoco  in {folder / 's3'}",
            f"# MLflow   {stack.mlflow.uri}  in {folder / 'mlflow'}",
            f"# Ray      {stack.ray_address}  logs in {ray_logs()}",
            "# In another terminal:",
            *exports,
            "# Ctrl-C stops everything; the data stays.",
        ]
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder for this process.

    The lock is the kernel's: it is released however the process ends, and never needs clean-up.

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
                f"{folder} is in use by process {lock.read().strip()}: stop it, or name another "
                "--folder"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
