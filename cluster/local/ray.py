"""Ray on this machine, alone or with the servers of `cluster.local.servers`.

Nothing outlives the command that started it: the servers run below `cluster.local.processes`, and
Ray ends with its driver.
"""

import contextlib
import dataclasses
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.local.processes import answers, last_line
from cluster.local.servers import (
    BUCKET,
    MlflowServer,
    S3Server,
    mlflow_server,
    s3_environment,
    s3_server,
)
from cluster.submit.checkout import CHECKOUT
from hemoco.errors import HemocoError, UsageError, first_line
from hemoco.storage.objects import home

_CONNECT_S = 5.0
# Variables that Ray reads when it starts, on this machine and in submitted jobs.
RAY_DEFAULTS = {
    # Ray would build a new uv environment for each worker if the command was started by `uv run`
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    # Ray Train would change the workers' folder, which breaks relative paths
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # ray.train.report() blocks for about one interval
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@dataclasses.dataclass(frozen=True)
class Stack:
    """A running S3 server, MLflow server and Ray."""

    s3: S3Server
    mlflow: MlflowServer
    ray_address: str

    def exports(self) -> dict[str, str]:
        """Environment variables by which another process finds all three."""
        return {
            **s3_environment(self.s3),
            "MLFLOW_TRACKING_URI": self.mlflow.uri,
            "RAY_ADDRESS": self.ray_address,
            **{name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")},
        }

    def check(self) -> None:
        """Checks that all three are running.

        Raises:
            HemocoError: one has ended; the message names it.
        """
        import ray

        for name, server in (("S3", self.s3), ("MLflow", self.mlflow)):
            if server.process.poll() is not None:
                raise HemocoError(
                    f"the {name} server has ended: {last_line(server.log)}; its log is {server.log}"
                )
        host, _, port = self.ray_address.rpartition(":")
        # the port first: ray.nodes() would wait for a head that has ended
        head_answers = answers(host, int(port), timeout_s=_CONNECT_S)
        if not head_answers or not any(node["Alive"] for node in ray.nodes()):
            raise HemocoError(f"Ray has ended; its logs are in {ray_logs()}")


@contextlib.contextmanager
def local_ray(*, cpus: int | None = None) -> Iterator[str]:
    """Connects to the cluster of `RAY_ADDRESS`, or starts a new one that ends with the block.

    Args:
        cpus: logical cores of a new cluster; default: those of the machine, at least 2, so that two
            ranks fit.

    Yields:
        The cluster's address, host:port.

    Raises:
        UsageError: `RAY_ADDRESS` names a dashboard.
        HemocoError: no cluster answers at `RAY_ADDRESS`, or it refuses.
    """
    import ray  # imported late: it takes seconds, and several verbs do without it

    address = os.environ.get("RAY_ADDRESS", "")
    with contextlib.ExitStack() as stack:
        if address:
            _connect_ray(address)
        else:
            _prepare_ray()
            _start_ray(cpus or max(2, len(os.sched_getaffinity(0))))
        stack.callback(ray.shutdown)
        yield address or str(ray.get_runtime_context().gcs_address)


@contextlib.contextmanager
def embedded_stack(folder: Path) -> Iterator[str]:
    """Runs S3 from `folder` and a new local Ray; `AWS_*` are set until the block ends.

    Yields:
        The URL of the bucket, s3://hemoco.
    """
    with s3_server(folder) as server, _environment(s3_environment(server)), local_ray():
        yield f"s3://{BUCKET}"


@contextlib.contextmanager
def development_stack(folder: Path, *, s3_port: int, mlflow_port: int) -> Iterator[Stack]:
    """Runs S3, MLflow and a new local Ray, with their data in `folder`.

    A port of 0 takes a free one.

    Raises:
        UsageError: a port is busy.
        HemocoError: one of them does not start.
    """
    with (
        s3_server(folder / "s3", port=s3_port) as s3,
        _environment(s3_environment(s3)),
        mlflow_server(folder / "mlflow", port=mlflow_port) as mlflow,
        local_ray() as ray_address,
    ):
        yield Stack(s3, mlflow, ray_address)


def ray_logs() -> str:
    """Returns the folder with the logs of the Ray that this process started."""
    return f"{_ray_folder()}/session_*_{os.getpid()}/logs"


def _ray_folder() -> str:
    """Returns the folder for sockets and logs of local clusters.

    It belongs to the user, and its path is short: that of a socket has at most 107 bytes.
    """
    return os.environ.get("RAY_TMPDIR") or f"/tmp/hemoco-ray-{os.getuid()}"


def _start_ray(cpus: int) -> None:
    import ray

    ray.init(
        address="local",  # None would join any cluster that it finds on the machine
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=256 * 1024**2,  # only URLs and numbers travel through it
        logging_level=logging.ERROR,
        runtime_env=_runtime_env(),
        _temp_dir=_ray_folder(),
    )


def _connect_ray(address: str) -> None:
    import ray

    url = urlsplit(address if "//" in address else f"//{address}")
    if url.scheme in ("http", "https"):
        raise UsageError(
            f"RAY_ADDRESS is {address}, the dashboard of a cluster: write `python -m jobs submit` "
            "before the verb to run it there, give host:port of its GCS, or unset it for a local "
            "Ray"
        )
    # ray.init would keep trying for minutes
    if url.port and not answers(url.hostname or "", url.port, timeout_s=_CONNECT_S):
        raise HemocoError(
            f"RAY_ADDRESS is {address}: nothing answers there; start the cluster, correct the "
            "address, or unset it for a local Ray"
        )
    try:
        ray.init(address=address, logging_level=logging.ERROR, runtime_env=_runtime_env())
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = first_line(error)
        raise HemocoError(
            f"RAY_ADDRESS is {address}: {reason}; check RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH, and "
            "that both sides have the same Python and Ray"
        ) from error


def _runtime_env() -> dict[str, Any]:
    """Keeps the placement group cleaner of Ray Train quiet in all workers.

    Without RAY_ADDRESS it looks for its cluster among all processes of the machine, which fails if
    there are two. If the cluster has no dashboard, it logs a warning every second.
    """

    # defined in a function, so that it is pickled by value: a remote worker may lack this module
    def prepare_worker() -> None:
        import logging
        import os

        import ray

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
        logging.getLogger(cleaner).setLevel("ERROR")

    return {"worker_process_setup_hook": prepare_worker}


def _prepare_ray() -> None:
    """Sets the variables that a local cluster needs and the user has not set.

    They stay set, because Ray reads some of them only once in a process. Ray turns on token
    authentication by itself for a cluster that it starts.
    """
    for name, value in RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(_token_file(home())))
    if sys.platform == "linux":
        # gloo would take the address of the host name, which may be unreachable
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # workers must import the packages of the checkout from any working directory
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(CHECKOUT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *paths])


def _token_file(folder: Path) -> Path:
    """Returns the file with the token of this user's local clusters; creates it if it is missing.

    Only the user may read it.
    """
    path = folder / "ray_token"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"ray_token.{os.getpid()}"
        own.touch(mode=0o600)
        own.write_text(secrets.token_hex(32))
        # link, not rename: if another process was first, its token stays
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
        own.unlink()
    return path


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables until the block ends."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
