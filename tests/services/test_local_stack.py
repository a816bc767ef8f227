"""The local stack: it starts, reports errors, and leaves no process behind, however it ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.local.processes import child_process
from cluster.local.ray import local_ray
from cluster.local.servers import s3_environment, s3_server
from hemoco.errors import HemocoError, UsageError
from hemoco.storage.objects import read_bytes, write_bytes
from tests.helpers.processes import alive, busy_port
from tests.helpers.waiting import within

ROOT = Path(__file__).parents[2]
SERVE = "import sys, time, pathlib\nfrom cluster.local.servers import s3_server\n"
SERVE += "with s3_server(pathlib.Path(sys.argv[1])): "
# a daemon of its own session, as servers start them, below a shell that ignores SIGTERM
STUBBORN = [
    "sh",
    "-c",
    "trap '' TERM; setsid sleep 1234 & echo $! > pids; sleep 5678 & echo $! >> pids; wait; wait",
]


def test_s3_stops_with_its_block(tmp_path):
    with s3_server(tmp_path):
        assert len(alive(str(tmp_path))) == 2  # rclone and its keeper
    assert alive(str(tmp_path)) == []


def test_two_s3_servers_stand_beside_each_other(tmp_path, monkeypatch):
    with s3_server(tmp_path / "a") as first, s3_server(tmp_path / "b") as second:
        for server, text in ((first, b"1"), (second, b"2")):
            for name, value in s3_environment(server).items():
                monkeypatch.setenv(name, value)
            write_bytes("s3://hemoco/k", text)
            assert read_bytes("s3://hemoco/k") == text


def test_the_secret_key_shows_in_no_command_line_and_no_repr(tmp_path):
    with s3_server(tmp_path) as server:
        assert alive(server.secret_key) == []
        assert server.secret_key not in repr(server)


def test_what_was_written_is_there_after_a_restart_with_another_key(tmp_path, monkeypatch):
    for expected in (None, b"kept"):
        with s3_server(tmp_path) as server:
            for name, value in s3_environment(server).items():
                monkeypatch.setenv(name, value)
            if expected is None:
                write_bytes("s3://hemoco/k", b"kept")
            else:
                assert read_bytes("s3://hemoco/k") == expected


def test_a_busy_port_is_named(tmp_path):
    with (
        busy_port() as port,
        pytest.raises(UsageError, match=f"port {port} for S3 is not free"),
        s3_server(tmp_path, port=port),
    ):
        pass


def test_a_killed_parent_leaves_no_s3_server(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", SERVE + "time.sleep(99)", tmp_path], cwd=ROOT)
    assert within(30, lambda: len(alive(f"{tmp_path}/buckets")) == 2)
    parent.kill()
    parent.wait()
    assert within(20, lambda: alive(str(tmp_path)) == [])


def test_daemons_that_ignore_sigterm_end_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with child_process(STUBBORN, log=tmp_path / "log", environment=dict(os.environ)):
        assert within(
            10,
            lambda: (
                (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2
            ),
        )
    assert not [
        pid for pid in (tmp_path / "pids").read_text().split() if Path(f"/proc/{pid}").exists()
    ]


def test_ray_workers_find_the_checkout_and_the_s3_server(ray_cluster, bucket):
    import ray

    @ray.remote(num_cpus=1)
    def work() -> str:
        os.chdir("/")
        import jobs.cli  # noqa: F401

        write_bytes(f"{bucket}/k", b"from a worker")
        return os.environ["RAY_ADDRESS"]

    assert ray.get(work.remote()) == ray_cluster
    assert read_bytes(f"{bucket}/k") == b"from a worker"


def test_ray_has_two_cores_at_least_and_asks_for_a_token(ray_cluster):
    import ray

    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert ray.cluster_resources()["CPU"] >= 2
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert token.is_relative_to(os.environ["HEMOCO_HOME"])
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_ray_address_where_nothing_answers_is_named_within_seconds(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    start = time.monotonic()
    with (
        pytest.raises(HemocoError, match=r"RAY_ADDRESS is 127\.0\.0\.1:9: nothing answers there"),
        local_ray(),
    ):
        pass
    assert time.monotonic() - start < 10
