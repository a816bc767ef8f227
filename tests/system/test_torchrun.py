"""The training loop under torchrun, without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.shard_folders import write_shards
from tests.helpers.torchrun_training import train

ROOT = Path(__file__).parents[2]


def test_the_loop_runs_under_torchrun_as_in_one_process(tmp_path: Path) -> None:
    shards, out = write_shards((tmp_path / "s").as_uri(), [20, 30]), tmp_path / "losses.json"
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --local-addr 127.0.0.1"
    script = ROOT / "tests" / "helpers" / "torchrun_training.py"
    command = f"ip link set lo up && {launcher} --nproc-per-node 2 {script} {shards} {out}"
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["ranks"] == 2
    assert found["losses"] == pytest.approx(train(shards), rel=1e-4)
