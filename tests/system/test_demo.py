"""The README's first command, as a user runs it, and what is left when it has ended."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import hemoco

ROOT = Path(__file__).parents[2]
INITS = ("pretrained", "random")


def jobs(*words, home, timeout=1200):
    environment = os.environ | {"HEMOCO_HOME": str(home)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "jobs", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def demo(home, tmp_path_factory):
    """Output of a finished demo and its folder."""
    out = tmp_path_factory.mktemp("out")
    done = jobs("demo", "--out", str(out), home=home)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, out


def test_demo_measures_every_transfer_from_both_inits(demo):
    rows = json.loads((demo[1] / "comparison.json").read_text())["rows"]
    expected = {
        (name, init) for name in ("knn", "linear_probe", "low_shot", "mask_rcnn") for init in INITS
    }
    assert {(row["transfer"], row["init"]) for row in rows} == expected


def test_pretraining_beats_random_initialisation_on_every_transfer(demo):
    rows = json.loads((demo[1] / "comparison.json").read_text())["rows"]
    values = {(row["transfer"], row["init"]): row["value"] for row in rows}
    for name in ("knn", "linear_probe", "low_shot", "mask_rcnn"):
        assert values[name, "pretrained"] > 1.5 * values[name, "random"], values


def test_progress_says_how_long_is_left(demo):
    lines = demo[0].splitlines()
    assert re.search(r"^\d stages, about \d+ min on two cores:$", lines[0])
    left = [line for line in lines if line.startswith("[") and line.endswith(" left")]
    assert len(left) == int(lines[0].split()[0])


def test_backbone_opens_after_the_demo_has_ended(demo):
    comparison = json.loads((demo[1] / "comparison.json").read_text())
    assert comparison["pretraining"]["backbone_url"] == (demo[1] / "backbone.safetensors").as_uri()
    assert hemoco.load_backbone(comparison["pretraining"]["backbone_url"]).num_features == 96


def test_named_commands_work_after_the_demo_has_ended(demo, home, tmp_path):
    stdout, out = demo
    words = (
        next(line for line in stdout.splitlines() if "jobs compare" in line)
        .split("jobs compare ")[1]
        .split()
    )
    again = jobs("compare", *words, "--out", str(tmp_path / "again"), home=home)
    exported = jobs(
        "export",
        str(out / "backbone.safetensors"),
        str(tmp_path / "b.st"),
        "--format",
        "timm",
        home=home,
    )
    assert again.returncode == 0 and exported.returncode == 0
    assert (tmp_path / "again" / "comparison.json").read_text() == (
        out / "comparison.json"
    ).read_text()


def test_printed_ui_command_opens_the_runs(demo):
    line = next(line for line in demo[0].splitlines() if "mlflow ui" in line)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        *line.split("mlflow ", 1)[1].split(),
        "--port",
        str(port),
    ]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert _answers(f"http://127.0.0.1:{port}/health")
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def _answers(url, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return reply.status == 200
        except OSError:
            time.sleep(1)
    return False
