"""Runs all tests in two lanes side by side, prints their logs, and fails if a test failed.

The first lane begins with the README's test command. The second runs the files of tests/system one
after another, and the first joins it when it is through. Each file is a pytest session of its own,
with its own servers on free ports, $HEMOCO_HOME and Ray. Files that measure time, or need both
cores, run alone afterwards. In tests/system a skip is a failure.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import NamedTuple

SYSTEM = Path("tests/system")
FIRST = (
    "night",
    "broken_runs",
    "submit_jobs",
    "docs_run",
    "sweep_real",
    "lineage",
    "detection_learning",
    "interrupt",
    "storage_stops",
    "up",
)
"""The longest ones, so that both lanes end at about the same time."""
ALONE = ("host_faults", "demo")
HEARTBEAT_S = 60.0
PATIENCE_S = 60.0
SLOWEST = 20


class Ended(NamedTuple):
    """A pytest session that has ended."""

    name: str
    seconds: float
    log: str
    fault: str
    """Reason for which it failed; empty if it passed."""


class Sessions:
    """Pytest sessions that end with this process; each is a process group."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped = False
        self._lock = threading.Lock()
        self.ended: list[Ended] = []

    def run(self, name: str, command: list[str], *, may_skip: bool) -> None:
        """Runs one session to its end."""
        path, start = self._logs / name, time.monotonic()
        with path.open("wb") as log:
            with self._lock:
                if self._stopped:
                    return
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                self._running[name] = process
            status = process.wait()
        text = path.read_text(errors="replace")
        fault = f"exit status {status}" if status else ""
        if not fault and not may_skip and re.search(r"^SKIPPED|\d+ skipped", text, re.MULTILINE):
            fault = "a test was skipped: here a skip is a failure"
        with self._lock:
            del self._running[name]
            self.ended.append(Ended(name, time.monotonic() - start, text, fault))
        print(f"{name}: {fault or 'passed'} after {time.monotonic() - start:.0f} s", flush=True)

    def names(self) -> list[str]:
        """Names of the running sessions."""
        with self._lock:
            return sorted(self._running)

    def stop(self) -> None:
        """Ends all sessions as Ctrl-C would, so that they stop their servers; no more are begun."""
        with self._lock:
            self._stopped = True
            running = list(self._running.values())
        for process in running:
            with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
                os.killpg(process.pid, signal.SIGINT)
        for process in running:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def system_files() -> list[str]:
    """Names of the files of tests/system that can run side by side, the longest first."""
    names = [path.stem.removeprefix("test_") for path in sorted(SYSTEM.glob("test_*.py"))]
    unknown = {*FIRST, *ALONE} - {*names}
    if unknown:
        raise SystemExit(f"{__file__} names files that are not there: {', '.join(sorted(unknown))}")
    return [*FIRST, *(name for name in names if name not in FIRST + ALONE)]


def run_system(sessions: Sessions, name: str) -> None:
    """Runs one file of tests/system."""
    command = ["uv", "run", "--no-sync", "pytest", str(SYSTEM / f"test_{name}.py"), "-rs"]
    command += ["--timeout", "1500", f"--durations={SLOWEST}"]
    sessions.run(name, command, may_skip=False)


def quick_lane(sessions: Sessions, waiting: "SimpleQueue[str]") -> None:
    """Runs the README's test command, then files of tests/system."""
    sessions.run("quick", ["uv", "run", "pytest", f"--durations={SLOWEST}"], may_skip=True)
    system_lane(sessions, waiting)


def system_lane(sessions: Sessions, waiting: "SimpleQueue[str]") -> None:
    """Runs files of tests/system until none is waiting."""
    while True:
        try:
            name = waiting.get_nowait()
        except Empty:
            return
        run_system(sessions, name)


def run_all(sessions: Sessions) -> None:
    """Runs the two lanes, then the files that run alone.

    Prints the names of running sessions now and then: some CI systems take silence for a hang.
    """
    waiting: SimpleQueue[str] = SimpleQueue()
    for name in system_files():
        waiting.put(name)
    lanes = [
        threading.Thread(target=lane, args=(sessions, waiting))
        for lane in (quick_lane, system_lane)
    ]
    start = time.monotonic()

    def alone() -> None:
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        for name in ALONE:
            run_system(sessions, name)

    whole = threading.Thread(target=alone)
    whole.start()
    while whole.is_alive():
        whole.join(HEARTBEAT_S)
        if whole.is_alive():
            print(f"{time.monotonic() - start:.0f} s: {', '.join(sessions.names())}", flush=True)


def slowest(ended: list[Ended]) -> list[str]:
    """Returns pytest's lines about the slowest tests of all sessions."""
    pattern = re.compile(r"^[\d.]+s (?:call|setup|teardown) .*", re.MULTILINE)
    lines = []
    for session in ended:
        lines += pattern.findall(session.log)
    return sorted(lines, key=lambda line: -float(line.partition("s ")[0]))[:SLOWEST]


def main() -> int:
    """Runs all tests; returns the exit status, 0 if all passed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # a shell starts its background processes with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with TemporaryDirectory(prefix="hemoco-logs-") as folder:
        sessions = Sessions(Path(folder))
        try:
            run_all(sessions)
        finally:
            sessions.stop()
    ended = sessions.ended
    for session in sorted(ended, key=lambda session: bool(session.fault)):  # failures last
        print(f"\n{'=' * 20} {session.name}, {session.seconds:.0f} s\n{session.log}")
    print(f"\n{'=' * 20} the {SLOWEST} slowest of all", *slowest(ended), sep="\n")
    print(f"\n{'=' * 20} sessions")
    for session in ended:
        print(f"{session.seconds:6.0f} s  {session.name}")
    faults = [f"{session.name}: {session.fault}" for session in ended if session.fault]
    expected = {"quick", *system_files(), *ALONE}
    missing = expected - {session.name for session in ended}
    faults += [f"{name}: was not run" for name in sorted(missing)]
    print("", *faults, "failed" if faults else "passed", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
