"""One driver at a time works at a run: a second one with the same name is refused."""

import contextlib
import fcntl
import hashlib
import time
from collections.abc import Iterator

import ray

from hemoco.errors import UsageError
from hemoco.storage import home

_NAMESPACE = "hemoco"
_GONE_S = 20.0  # Ray needs some time to see that a driver was killed
_POLL_S = 0.5


@contextlib.contextmanager
def only_driver(run: str) -> Iterator[None]:
    """Holds the name of a run until the block ends, however it ends, against drivers of this cluster and this machine.

    Object storage cannot lock: rclone's server takes a conditional write and ignores the condition. Ray's names are
    held by the head alone, and the kernel's locks serve those that have a Ray of their own each.

    Raises:
        UsageError: another driver holds it.
    """
    with _file_held(run), _name_held(run):
        yield


@contextlib.contextmanager
def _file_held(run: str) -> Iterator[None]:
    path = home() / "locks" / f"{hashlib.sha256(run.encode()).hexdigest()[:16]}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _refusal(run) from error
        yield


@contextlib.contextmanager
def _name_held(run: str) -> Iterator[None]:
    deadline = time.monotonic() + _GONE_S
    while True:
        try:
            holder = ray.remote(num_cpus=0)(_Holder).options(name=f"run {run}", namespace=_NAMESPACE).remote()
            break
        except ValueError as error:  # the name is taken
            if time.monotonic() > deadline:
                raise _refusal(run) from error
        time.sleep(_POLL_S)
    try:
        ray.get(holder.wait.remote())
        yield
    finally:
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster may be gone
            ray.kill(holder)


class _Holder:
    """Dies with the driver that made it."""

    def wait(self) -> None:
        """Returns when it has been made."""


def _refusal(run: str) -> UsageError:
    return UsageError(
        f"run {run!r} is being worked at by another process: wait for it, stop it, or choose another --run name"
    )
