"""The embedded stack of one machine: Ray, alone or with the servers of `cluster.local.servers`.

Nothing outlives the command that started it: servers run below `cluster.local.processes`, Ray shares the driver's fate.
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
RAY_DEFAULTS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a worker that changes its folder breaks relative paths
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # ray.train.report() blocks for about one interval
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@dataclasses.dataclass(frozen=True)
class Stack:
    """A running S3 server, MLflow server and Ray."""

    s3: S3Server
    mlflow: MlflowServer
    ray_address: str

    def exports(self) -> dict[str, str]:
        """The variables by which another process finds all three."""
        return {
            **s3_environment(self.s3),
            "MLFLOW_TRACKING_URI": self.mlflow.uri,
            "RAY_ADDRESS": self.ray_address,
            **{name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")},
        }

    def check(self) -> None:
        """Does nothing while all run.

        Raises:
            HemocoError: one has ended; says which.
        """
        import ray

        for name, server in (("S3", self.s3), ("MLflow", self.mlflow)):
            if server.process.poll() is not None:
                raise HemocoError(
                    f"the {name} server has ended: {last_line(server.log)}; its log is {server.log}"
                )
        host, _, port = self.ray_address.rpartition(":")
        # asked only where the head answers, for Ray itself would wait for it
        if not (
            answers(host, int(port), timeout_s=_CONNECT_S)
            and any(node["Alive"] for node in ray.nodes())
        ):
            raise HemocoError(f"Ray has ended; its logs are in {ray_logs()}")


@contextlib.contextmanager
def local_ray(*, cpus: int | None = None) -> Iterator[str]:
    """Ray for this process: the cluster of `RAY_ADDRESS`, or a new one on this machine that ends with the block.

    Args:
        cpus: logical cores of a new cluster; default: those of the machine, and 2 at least, so that two ranks fit.

    Yields:
        The cluster's address, host:port.

    Raises:
        UsageError: `RAY_ADDRESS` names a dashboard.
        HemocoError: no cluster answers at `RAY_ADDRESS`, or it refuses.
    """
    import ray  # seconds to import, and several verbs do without

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
    """S3 from `folder` and a new local Ray whose workers know it; `AWS_*` are set until the block ends.

    Yields:
        The URL of the bucket, s3://hemoco.
    """
    with s3_server(folder) as server, _environment(s3_environment(server)), local_ray():
        yield f"s3://{BUCKET}"


@contextlib.contextmanager
def development_stack(folder: Path, *, s3_port: int, mlflow_port: int) -> Iterator[Stack]:
    """S3, MLflow and a new local Ray that keep their data in `folder`; a port of 0 takes a free one.

    Raises:
        UsageError: a port is busy.
        HemocoError: one does not start.
    """
    with (
        s3_server(folder / "s3", port=s3_port) as s3,
        _environment(s3_environment(s3)),
        mlflow_server(folder / "mlflow", port=mlflow_port) as mlflow,
        local_ray() as ray_address,
    ):
        yield Stack(s3, mlflow, ray_address)


def ray_logs() -> str:
    """The folder with the logs of the Ray that this process started."""
    return f"{_ray_folder()}/session_*_{os.getpid()}/logs"


def _ray_folder() -> str:
    """Sockets and logs of local clusters: the user's own, and short, for a socket's path has at most 107 bytes."""
    return os.environ.get("RAY_TMPDIR") or f"/tmp/hemoco-ray-{os.getuid()}"


def _start_ray(cpus: int) -> None:
    import ray

    ray.init(
        address="local",  # None would join any cluster it finds on the machine
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=256 * 1024**2,  # only URLs and numbers travel through it
        logging_level=logging.ERROR,
        runtime_env=_runtime_env(),
        _temp_dir=_ray_folder(),
    )


def _connect_ray(address: str) -> None:
    import ray

    place = urlsplit(address if "//" in address else f"//{address}")
    if place.scheme in ("http", "https"):
        raise UsageError(
            f"RAY_ADDRESS is {address}, the dashboard of a cluster: say `python -m jobs submit` before the verb to run "
            "it there, give host:port of its GCS, or unset it for a local Ray"
        )
    # Ray itself would go on trying for minutes
    if place.port and not answers(place.hostname or "", place.port, timeout_s=_CONNECT_S):
        raise HemocoError(
            f"RAY_ADDRESS is {address}: nothing answers there; start the cluster, correct the address, or unset it "
            "for a local Ray"
        )
    try:
        ray.init(address=address, logging_level=logging.ERROR, runtime_env=_runtime_env())
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = first_line(error)
        raise HemocoError(
            f"RAY_ADDRESS is {address}: {reason}; check RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH, and that both sides "
            "have the same Python and Ray"
        ) from error


def _runtime_env() -> dict[str, Any]:
    """Keeps the watchdog of Ray Train quiet, which looks for its cluster among all processes of the machine, fails
    where there are two, and complains every second where the cluster has no dashboard."""

    def prepare_worker() -> (
        None
    ):  # defined here so that it travels by value: a remote worker may lack this module
        import logging
        import os

        import ray

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        logging.getLogger(
            "ray.train.v2._internal.execution.controller.placement_group_cleaner"
        ).setLevel("ERROR")

    return {"worker_process_setup_hook": prepare_worker}


def _prepare_ray() -> None:
    """Sets what a local cluster needs and the user has not set; it stays, for Ray reads some of it only once.

    Ray itself turns token authentication on for a cluster that it starts.
    """
    for name, value in RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(_token_file(home())))
    if sys.platform == "linux":  # a host name that resolves to an unreachable address stops gloo
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # workers import the checkout's packages whatever the working directory
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(CHECKOUT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *paths])


def _token_file(folder: Path) -> Path:
    """The file with the token of this user's local clusters, made at first; only the user may read it."""
    path = folder / "ray_token"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"ray_token.{os.getpid()}"
        made.touch(mode=0o600)
        made.write_text(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another process was first: its token counts
            os.link(made, path)
        made.unlink()
    return path


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
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
