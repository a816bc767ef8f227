"""`python -m jobs up`: its exports work for other processes, and it leaves no process behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import alive, busy_port
from tests.helpers.waiting import within

ROOT = Path(__file__).parents[2]


def jobs(*words: str, **environment: str) -> "subprocess.Popen[str]":
    """Starts `python -m jobs`."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *words],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_up_names_a_busy_port(tmp_path):
    with busy_port() as port:
        up = jobs("up", "--folder", str(tmp_path), "--mlflow-port", str(port))
        error = up.communicate(timeout=100)[1]
    assert (up.returncode, len(error.splitlines())) == (2, 1)
    assert f"port {port} for MLflow is not free" in error
    assert alive(str(tmp_path)) == []


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_up_prints_exports_and_stops_cleanly(tmp_path, end):
    up = jobs("up", "--folder", str(tmp_path))
    exports = read_exports(up)
    for name, value in exports.items():
        assert value, name
    second = jobs("up", "--folder", str(tmp_path))
    assert f"is in use by process {up.pid}" in second.communicate(timeout=60)[1]
    assert second.returncode == 1
    up.send_signal(end)
    up.communicate(timeout=60)
    assert up.returncode == 0
    assert alive(str(tmp_path)) + alive(f"_{up.pid}/") == []


def test_another_process_uses_what_up_exports(tmp_path):
    up = jobs("up", "--folder", str(tmp_path))
    script = (
        "import ray; from cluster.local.ray import local_ray\n"
        "from hemoco.tracking.client import connect, tracking_uri\n"
        "from hemoco.storage.objects import read_bytes, write_bytes\n"
        "connect(tracking_uri()); write_bytes('s3://hemoco/k', b'1')\n"
        "with local_ray() as address:\n"
        "    print(address, ray.get(ray.remote(read_bytes).remote('s3://hemoco/k')))"
    )
    exports = read_exports(up)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | exports,
        capture_output=True,
        text=True,
        check=False,
    )
    up.terminate()
    up.communicate(timeout=60)
    assert done.stdout.split() == [exports["RAY_ADDRESS"], "b'1'"], done.stderr


@pytest.mark.parametrize(
    ("part", "named"), [("rclone", "S3"), ("mlflow", "MLflow"), ("raylet", "Ray"), ("", "")]
)
def test_up_ends_whole_when_a_part_or_itself_is_killed(tmp_path, part, named):
    up = jobs("up", "--folder", str(tmp_path))
    read_exports(up)
    marks = {
        "rclone": f"{tmp_path}/s3/buckets",
        "mlflow": f"{tmp_path}/mlflow/artifacts",
        "raylet": f"_{up.pid}/sockets",
    }
    victims = (
        set(alive(marks[part])) & set(alive(f"/{part}") + alive(part)) - keepers()
        if part
        else {up.pid}
    )
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    error = up.communicate(timeout=100)[1].splitlines()
    assert up.returncode == (1 if part else -signal.SIGKILL)
    assert not part or f"{named} " in error[-1]
    assert within(30, lambda: alive(str(tmp_path)) + alive(f"_{up.pid}/") == [])


def keepers() -> set[int]:
    """Process ids of the keepers, which end with their servers."""
    return set(alive("cluster/local/processes.py"))


def read_exports(up: "subprocess.Popen[str]") -> dict[str, str]:
    """The variables that `up` prints, once it is ready."""
    assert up.stdout is not None
    exports = {}
    for line in up.stdout:
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").strip().partition("=")
            exports[name] = value
        if "Ctrl-C" in line:
            return exports
    pytest.fail(f"up ended: {up.communicate()[1]}")
