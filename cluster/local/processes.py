"""Child processes that cannot outlive their parent, even if the parent is killed.

Each command runs below a keeper: this file as a script, which imports psutil alone. The keeper ends
when the parent has gone or sends SIGTERM, and then ends everything that the command has started,
daemons included. PR_SET_PDEATHSIG would not do: it does not reach grandchildren, and it needs a
preexec_fn, which is unsafe in a process with threads.
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
    """Runs a command until the block ends.

    Args:
        command: the command and its arguments.
        log: file for its output; it is overwritten.
        environment: all environment variables of the command.

    Yields:
        The keeper, which ends with the command.
    """
    # -I: PYTHON* variables meant for the command do not reach the keeper
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
    """Waits until `ready()` is true; returns False if the child ends or the time is up before."""
    deadline = time.monotonic() + timeout_s
    while child.poll() is None and time.monotonic() < deadline:
        if ready():
            return True
        time.sleep(_POLL_S)
    return False


def answers(host: str, port: int, *, timeout_s: float) -> bool:
    """Returns whether something accepts TCP connections at an address."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def last_line(log: Path) -> str:
    """Returns the last non-empty line of a log, for an error message."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "its log is empty"


def _keep(parent: int, command: list[str]) -> int:
    """Runs the command and ends all its processes with it; the main function of the keeper.

    Args:
        parent: process id of the process that started the keeper.
        command: the command and its arguments.

    Returns:
        The exit status of the command, or 0 if the keeper was stopped.
    """
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent
    if sys.platform == "linux":
        # daemons of the command become children of the keeper instead of init, so it finds them
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command)
    # the parent's process id changes when the parent ends, however it ends
    while child.poll() is None and not stopping and os.getppid() == parent:
        time.sleep(_POLL_S)
    status = child.poll()
    child.terminate()
    _end_descendants(_GRACE_S)
    return 0 if status is None else abs(status)


def _end_descendants(grace_s: float) -> None:
    """Sends SIGTERM to all descendants, and SIGKILL to those that are left after the grace time.

    Descendants that are started meanwhile are included.
    """
    keeper, deadline = psutil.Process(), time.monotonic() + grace_s
    terminated: set[psutil.Process] = set()
    while descendants := set(keeper.children(recursive=True)):
        if time.monotonic() > deadline:
            signalled, number = descendants, signal.SIGKILL
        else:
            signalled, number = descendants - terminated, signal.SIGTERM
        for process in signalled:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        terminated |= descendants
        # also reaps the zombies that have become our children
        psutil.wait_procs(descendants, timeout=_POLL_S / 2)


if __name__ == "__main__":
    sys.exit(_keep(int(sys.argv[1]), sys.argv[2:]))
