"""Child processes that cannot outlive their parent, not even a killed one.

Each command runs below a keeper: this file as a script, with psutil alone. The keeper ends when the parent has gone or
sends SIGTERM, and takes with it all that the command has started, daemons included. PR_SET_PDEATHSIG alone would not
reach grandchildren and needs a preexec_fn, which is unsafe in a process with threads.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1
_GRACE_S = 8.0


@contextlib.contextmanager
def child_process(
    command: Sequence[str], *, log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command until the block ends; its output goes to `log`.

    Yields:
        The keeper, which ends with the command.
    """
    keeper = [sys.executable, "-I", str(Path(__file__).resolve()), str(os.getpid()), *command]
    with log.open("wb") as output:
        child = subprocess.Popen(
            keeper,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(timeout=2 * _GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_until(
    ready: Callable[[], bool], child: subprocess.Popen[bytes], *, timeout_s: float
) -> bool:
    """Whether `ready()` came true before the child ended and the time was up."""
    deadline = time.monotonic() + timeout_s
    while child.poll() is None and time.monotonic() < deadline:
        if ready():
            return True
        time.sleep(_POLL_S)
    return False


def answers(host: str, port: int, *, timeout_s: float) -> bool:
    """Whether something accepts TCP connections there."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def last_line(log: Path) -> str:
    """The last non-empty line of a log, for an error message."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "its log is empty"


def _keep(parent: int, command: list[str]) -> int:
    """Runs the command; returns its exit status, or 0 when it was told to stop."""
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent
    if (
        sys.platform == "linux"
    ):  # daemons of the command become children of the keeper, so it finds them
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command)
    while child.poll() is None and not stopping and os.getppid() == parent:
        time.sleep(_POLL_S)
    status = child.poll()
    child.terminate()
    _end_descendants(_GRACE_S)
    return 0 if status is None else abs(status)


def _end_descendants(grace_s: float) -> None:
    """SIGTERM to all, SIGKILL after the grace time to those that are left or were started meanwhile."""
    keeper, deadline = psutil.Process(), time.monotonic() + grace_s
    asked: set[psutil.Process] = set()
    while found := set(keeper.children(recursive=True)):
        late = time.monotonic() > deadline
        for process in found if late else found - asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if late else signal.SIGTERM)
        asked |= found
        psutil.wait_procs(
            found, timeout=_POLL_S / 2
        )  # also removes zombies that have become our children


if __name__ == "__main__":
    sys.exit(_keep(int(sys.argv[1]), sys.argv[2:]))
