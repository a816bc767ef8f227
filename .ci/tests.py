"""Runs all tests in two lanes side by side, prints their logs at the end, and fails where a test failed.

The first lane begins with the README's test command. The second takes the files of tests/system one after another, and
the first joins it when it is through. Each file is a pytest session of its own, with its own servers on free ports,
$HEMOCO_HOME and Ray. Files that measure time, or need both cores, run alone afterwards. In tests/system a skip is a
failure.
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
FIRST = ("two_s3_servers", "submit_jobs", "up", "sweep_real", "lineage", "broken_runs")
"""The longest ones, so that both lanes end at about the same time."""
ALONE = ("night", "host_faults", "demo")
HEARTBEAT_S = 60.0
PATIENCE_S = 60.0
SLOWEST = 20


class Ended(NamedTuple):
    """A pytest session that has ended."""

    name: str
    seconds: float
    log: str
    fault: str
    """What is wrong with it; empty: nothing."""


class Sessions:
    """Pytest sessions, each a process group, which end with this process."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped = False
        self._lock = threading.Lock()
        self.ended: list[Ended] = []

    def run(self, name: str, command: list[str], *, may_skip: bool) -> None:
        """Runs one to its end."""
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
        """Sessions that run now."""
        with self._lock:
            return sorted(self._running)

    def stop(self) -> None:
        """Ends all that run as Ctrl-C would, so that they stop their servers; none is begun any more."""
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
    if unknown := {*FIRST, *ALONE} - {*names}:
        raise SystemExit(f"{__file__} names files that are not there: {', '.join(sorted(unknown))}")
    return [*FIRST, *(name for name in names if name not in FIRST + ALONE)]


def run_system(sessions: Sessions, name: str) -> None:
    """Runs one file of tests/system."""
    file = str(SYSTEM / f"test_{name}.py")
    command = [
        "uv",
        "run",
        "--no-sync",
        "pytest",
        file,
        "-rs",
        "--timeout",
        "1500",
        f"--durations={SLOWEST}",
    ]
    sessions.run(name, command, may_skip=False)


def quick_lane(sessions: Sessions, waiting: "SimpleQueue[str]") -> None:
    """The README's command, then files that wait."""
    sessions.run("quick", ["uv", "run", "pytest", f"--durations={SLOWEST}"], may_skip=True)
    system_lane(sessions, waiting)


def system_lane(sessions: Sessions, waiting: "SimpleQueue[str]") -> None:
    """Files that wait, until none does."""
    while True:
        try:
            name = waiting.get_nowait()
        except Empty:
            return
        run_system(sessions, name)


def run_all(sessions: Sessions) -> None:
    """Two lanes, then what runs alone; prints now and then what it is at, for CI that takes silence for a hang."""
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
    """The lines of pytest about the slowest tests of all sessions."""
    line = re.compile(r"^[\d.]+s (?:call|setup|teardown) .*", re.MULTILINE)
    lines = [found for each in ended for found in line.findall(each.log)]
    return sorted(lines, key=lambda line: -float(line.partition("s ")[0]))[:SLOWEST]


def main() -> int:
    """Returns the exit status: 0 where all passed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts what is in its background with it ignored
    with TemporaryDirectory(prefix="hemoco-logs-") as folder:
        sessions = Sessions(Path(folder))
        try:
            run_all(sessions)
        finally:
            sessions.stop()
    for each in sorted(sessions.ended, key=lambda each: bool(each.fault)):
        print(f"\n{'=' * 20} {each.name}, {each.seconds:.0f} s\n{each.log}")
    print(f"\n{'=' * 20} the {SLOWEST} slowest of all", *slowest(sessions.ended), sep="\n")
    print(
        f"\n{'=' * 20} sessions",
        *(f"{each.seconds:6.0f} s  {each.name}" for each in sessions.ended),
        sep="\n",
    )
    faults = [f"{each.name}: {each.fault}" for each in sessions.ended if each.fault]
    wanted = {"quick", *system_files(), *ALONE}
    faults += [
        f"{name}: was not run" for name in sorted(wanted - {each.name for each in sessions.ended})
    ]
    print("", *faults, "failed" if faults else "passed", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
