"""Ctrl-C of a whole run from a terminal: in its pretraining, and in its fan-out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hemoco.storage.objects import list_names
from hemoco.tracking.client import connect
from hemoco.tracking.runs import search
from tests.helpers.shard_folders import write_shards

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """For each phase: output of the interrupted command, exit status, and statuses in MLflow."""
    folder = tmp_path_factory.mktemp("interrupt")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "HEMOCO_HOME": str(folder / "home")}
    shards = write_shards((folder / "shards").as_uri(), [700, 700])
    argv = ["run", "tests/helpers/night_recipe.py", "--run", "night"]
    argv += ["--storage", str(folder / "runs"), "--data.shards", shards]
    argv += ["--data.test_split", "train", "--pretrain.epochs", "4"]
    checkpoints = (folder / "runs/night/pretrain/checkpoints").as_uri()
    found = {}
    for phase, reached in (
        ("pretrain", lambda: list_names(checkpoints)),
        ("transfer", lambda: search(uri, connect(uri), {"hemoco.phase": "transfer"})),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *argv],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 300
        while not reached():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[
                0
            ].decode()[-3000:]
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=90)[0].decode()
        statuses = {
            run.tags["hemoco.phase"]: run.status
            for run in search(uri, connect(uri), {"hemoco.run": "night"})
        }
        found[phase] = output, process.returncode, statuses
    return found


@pytest.mark.parametrize("phase", ["pretrain", "transfer"])
def test_ctrl_c_ends_with_one_line_that_says_how_to_go_on(interrupted, phase):
    output, status, _ = interrupted[phase]
    assert status == 1
    assert "error: interrupted; run the same command again to resume where it stopped" in output
    assert "Traceback" not in output


def test_mlflow_says_killed_of_what_was_interrupted(interrupted):
    assert interrupted["pretrain"][2] == {"parent": "KILLED", "pretrain": "KILLED"}


def test_what_was_finished_before_stays_so(interrupted):
    statuses = interrupted["transfer"][2]
    assert (statuses["parent"], statuses["pretrain"], statuses["transfer"]) == (
        "KILLED",
        "FINISHED",
        "KILLED",
    )
