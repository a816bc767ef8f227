"""Draining a node whose Ray does not answer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("address", ["127.0.0.1:9", "192.0.2.1:6379"])
def test_trainings_are_told_to_save_where_no_ray_answers(address):
    # a network of its own, because the drain ends all trainings of its network
    training = "exec -a ray::RayTrainWorker sleep 600"
    script = (
        f"bash -c '{training}' & $0 -m cluster.drain --grace_s 12; echo drain $?; "
        "wait $!; echo training $?"
    )
    words = ["unshare", "--net", "bash", "-c", script, sys.executable]
    environment = os.environ | {"RAY_ADDRESS": address}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["drain", "0", "training", str(128 + signal.SIGTERM)]
    assert "Ray does not drain this node, and may place work here again: " in done.stderr
