"""The guarantees of tests/conftest.py, on which every test may rely."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHILD = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
SESSION = (
    f"import subprocess, sys, tests.conftest; subprocess.run([sys.executable, '-c', {CHILD!r}])"
)


def test_processes_of_a_session_that_began_with_sigint_ignored_can_be_interrupted(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n"
