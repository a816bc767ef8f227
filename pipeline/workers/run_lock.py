"""Lock on the name of a run: only one driver at a time can work on it."""

import contextlib
import fcntl
import hashlib
import io
import logging
import time
from collections.abc import Iterator

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hemoco.errors import UsageError, first_line
from hemoco.storage.objects import home

logger = logging.getLogger(__name__)

_NAMESPACE = "hemoco"
_GONE_S = 20.0
"""Seconds after which a taken name is refused: Ray frees that of a killed driver with a delay."""
_POLL_S = 0.5


@contextlib.contextmanager
def only_driver(run: str) -> Iterator[None]:
    """Locks the name of a run until the block ends, against drivers of this cluster and machine.

    Two locks are taken. The name of a Ray actor, which the head of the cluster holds, excludes
    other drivers of the same cluster. A file lock excludes drivers on this machine that each have
    their own Ray. Where $HEMOCO_HOME cannot be written, the file lock is left out with a warning:
    that is no reason to refuse the training. Object storage could lock for all clusters, but not
    every server can: rclone's accepts a conditional write and ignores the condition.

    Raises:
        UsageError: another driver has the lock.
    """
    with _file_lock(run), _actor_lock(run):
        yield


@contextlib.contextmanager
def _file_lock(run: str) -> Iterator[None]:
    try:
        file = _open_lock_file(run)
    except OSError as error:
        logger.warning(
            "event=run_lock_unwritable run=%s reason=%s; a second driver is noticed on this Ray "
            "cluster alone; set HEMOCO_HOME to a folder that can be written",
            run,
            first_line(error),
        )
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _refusal(run) from error
        yield


def _open_lock_file(run: str) -> io.TextIOWrapper:
    """Opens the file to lock.

    Raises:
        OSError: $HEMOCO_HOME cannot be written.
    """
    path = home() / "locks" / f"{hashlib.sha256(run.encode()).hexdigest()[:16]}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


@contextlib.contextmanager
def _actor_lock(run: str) -> Iterator[None]:
    deadline = time.monotonic() + _GONE_S
    # On the driver's own node: the loss of another node would end the actor and free the name.
    own_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    while True:
        try:
            holder = ray.remote(num_cpus=0, scheduling_strategy=own_node)(_Holder)
            actor = holder.options(name=f"run {run}", namespace=_NAMESPACE).remote()
            break
        except ValueError as error:  # the name is taken
            if time.monotonic() > deadline:
                raise _refusal(run) from error
        time.sleep(_POLL_S)
    try:
        ray.get(actor.ready.remote())
        yield
    finally:
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster may be gone
            ray.kill(actor)


class _Holder:
    """Actor whose name is the lock; Ray ends it when its driver ends, however that happens."""

    def ready(self) -> None:
        """Returns once the actor has started."""


def _refusal(run: str) -> UsageError:
    return UsageError(
        f"run {run!r} is in use by another process: "
        "wait for it, stop it, or choose another --run name"
    )
