"""One driver at a time works at a run: a second one with the same name is refused."""

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
_GONE_S = 20.0  # Ray needs some time to see that a driver was killed
_POLL_S = 0.5


@contextlib.contextmanager
def only_driver(run: str) -> Iterator[None]:
    """Holds the name of a run until the block ends, however it ends, against drivers of this cluster and this machine.

    Object storage cannot lock: rclone's server takes a conditional write and ignores the condition. Ray's names are
    held by the head alone, and the kernel's locks serve those that have a Ray of their own each. Where $HEMOCO_HOME
    cannot be written, Ray's names alone are held, with a warning: that is no reason not to train.

    Raises:
        UsageError: another driver holds it.
    """
    with _file_held(run), _name_held(run):
        yield


@contextlib.contextmanager
def _file_held(run: str) -> Iterator[None]:
    try:
        file = _lock_file(run)
    except OSError as error:
        logger.warning(
            "event=run_lock_unwritable run=%s reason=%s; a second driver is noticed on this Ray cluster alone; set "
            "HEMOCO_HOME to a folder that can be written",
            *(run, first_line(error)),
        )
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _refusal(run) from error
        yield


def _lock_file(run: str) -> io.TextIOWrapper:
    """Opened, not yet locked.

    Raises:
        OSError: $HEMOCO_HOME cannot be written.
    """
    path = home() / "locks" / f"{hashlib.sha256(run.encode()).hexdigest()[:16]}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


@contextlib.contextmanager
def _name_held(run: str) -> Iterator[None]:
    deadline = time.monotonic() + _GONE_S
    # beside its driver: with another node it would go, and the name with it
    beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    while True:
        try:
            holder = ray.remote(num_cpus=0, scheduling_strategy=beside)(_Holder)
            held = holder.options(name=f"run {run}", namespace=_NAMESPACE).remote()
            break
        except ValueError as error:  # the name is taken
            if time.monotonic() > deadline:
                raise _refusal(run) from error
        time.sleep(_POLL_S)
    try:
        ray.get(held.wait.remote())
        yield
    finally:
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster may be gone
            ray.kill(held)


class _Holder:
    """Dies with the driver that made it."""

    def wait(self) -> None:
        """Returns when it has been made."""


def _refusal(run: str) -> UsageError:
    return UsageError(
        f"run {run!r} is being worked at by another process: wait for it, stop it, or choose another --run name"
    )
