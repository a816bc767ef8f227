"""A storage server that stops while a pretraining writes to it."""

import contextlib
import dataclasses
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import s3fs

from cluster.local.servers import BUCKET, S3Server, s3_environment, s3_server
from hemoco.errors import StorageError
from hemoco.storage.objects import list_names
from hemoco.train.checkpoint import newest_checkpoint, save_checkpoint
from hemoco.train.pretrain import build_state
from pipeline.pretrain import PretrainJob, pretrain_worker
from tests.helpers.shard_folders import write_shards
from tests.helpers.small_pretraining import (
    CONFIG,
    CPU,
    ROOT,
    Troubled,
    new_job,
    python,
    same_result,
    write_images,
)

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")


class Storage:
    """An S3 server that can be stopped and started again on the same port."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch, self._port = folder, patch, 0
        self._stack = contextlib.ExitStack()
        self.server: S3Server

    def start(self) -> None:
        self.server = self._stack.enter_context(s3_server(self._folder, port=self._port))
        self._port = int(self.server.endpoint.rpartition(":")[2])
        for name, value in s3_environment(self.server).items():  # each start has a new key
            self._patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    def stop(self) -> None:
        self._stack.close()


class Stalling(socketserver.ThreadingTCPServer):
    """Relay that stalls once a connection has sent a megabyte; `stalled` is set then."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.upstream = urlsplit(upstream)
        self.stalled, self.ended = threading.Event(), threading.Event()


class _Connection(socketserver.BaseRequestHandler):
    server: Stalling

    def handle(self) -> None:
        sent, address = 0, (self.server.upstream.hostname, self.server.upstream.port)
        with socket.create_connection(address) as upstream:
            threading.Thread(target=self._back, args=(upstream,), daemon=True).start()
            while sent < 10**6 and (data := self.request.recv(2**16)):
                upstream.sendall(data)
                sent += len(data)
            if sent >= 10**6:
                self.server.stalled.set()
                self.server.ended.wait(60)

    def _back(self, upstream: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := upstream.recv(2**16):
                self.request.sendall(data)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    made = Storage(tmp_path, monkeypatch)
    made.start()
    yield made
    made.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_images(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def job(shards: str, tracking: str, tmp_path: Path) -> PretrainJob:
    return new_job(shards, tracking, (tmp_path / "run").as_uri())


@pytest.fixture(scope="module")
def unbroken(shards: str, tracking: str, tmp_path_factory: pytest.TempPathFactory) -> PretrainJob:
    """An undisturbed pretraining."""
    job = new_job(shards, tracking, tmp_path_factory.mktemp("unbroken").as_uri())
    pretrain_worker(job, Troubled())
    return job


def test_storage_that_stops_while_a_checkpoint_is_due_ends_the_run_in_one_line_and_nothing_is_lost(
    job: PretrainJob, unbroken: PretrainJob, storage: Storage
) -> None:
    impatient = dataclasses.replace(
        job.config, stream=dataclasses.replace(job.config.stream, retry_s=3.0)
    )
    job = dataclasses.replace(job, url=f"s3://{BUCKET}/run", config=impatient)
    with pytest.raises(
        StorageError, match=r"/run/checkpoints/step_00000004_a0/.* can be reached"
    ) as ended:
        pretrain_worker(job, Troubled(storage.stop))
    assert "\n" not in str(ended.value)
    storage.start()
    assert list_names(f"{job.url}/checkpoints") == ["step_00000002_a0"]
    pretrain_worker(job, Troubled())
    assert same_result(job, unbroken)


RECIPE = """
import dataclasses
from hemoco.config import DataConfig, Recipe, ResourcesConfig
from tests.helpers.small_pretraining import CONFIG
pretrain = dataclasses.replace(
    CONFIG, epochs=16, checkpoint_every_steps=8, resources=ResourcesConfig(workers=2),
    stream=dataclasses.replace(CONFIG.stream, retry_s=3.0),
)
recipe = Recipe(name="stopped", data=DataConfig(), pretrain=pretrain)
"""


def test_a_storage_that_stops_in_mid_run_ends_the_command_in_one_line_and_the_same_words_go_on(
    storage: Storage, tracking: str, tmp_path: Path
) -> None:
    shards = write_shards(f"s3://{BUCKET}/shards", [32, 32, 32, 32])
    (tmp_path / "stopped.py").write_text(RECIPE)
    words = [
        "-m",
        "jobs",
        "pretrain",
        str(tmp_path / "stopped.py"),
        "--run",
        "stopped",
        "--data.shards",
        shards,
    ]
    words += ["--storage", f"s3://{BUCKET}/runs"]
    paths = {"PYTHONPATH": str(ROOT)}
    first = threading.Thread(target=_stop_after_a_checkpoint, args=(storage, tmp_path / "buckets"))
    first.start()
    done = python(*words, **paths)
    first.join()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and f"s3://{BUCKET}/" in line and "can be reached" in line, (
        done.stderr
    )
    assert done.stderr.splitlines()[-1] == line, done.stderr
    storage.start()
    again = python(*words, **paths)
    assert again.returncode == 0 and "resumed from step" in again.stderr + again.stdout, (
        again.stderr
    )


def _stop_after_a_checkpoint(storage: Storage, buckets: Path) -> None:
    deadline = time.monotonic() + 100
    while not list(buckets.glob("*/runs/stopped/pretrain/checkpoints/*/manifest.json")):
        assert time.monotonic() < deadline, "there is no checkpoint"
        time.sleep(0.1)
    storage.stop()


SAVE = """
import sys, torch
from hemoco.train.checkpoint import save_checkpoint
from hemoco.config import EncoderConfig, PretrainConfig
from hemoco.train.pretrain import build_state
config = PretrainConfig(encoder=EncoderConfig(architecture="resnet10t"))
state = build_state(config, torch.device("cpu"), data_digest="d")
state.step = 2
save_checkpoint(state, sys.argv[1], attempt=0, keep_last=9)
"""


def test_a_process_killed_in_the_upload_of_a_checkpoint_leaves_the_one_before_as_the_newest(
    storage: Storage,
) -> None:
    state, url = build_state(CONFIG, CPU, data_digest="d"), f"s3://{BUCKET}/checkpoints"
    state.step = 1
    before = save_checkpoint(state, url, attempt=0, keep_last=9)
    with Stalling(storage.server.endpoint) as between:
        threading.Thread(target=between.serve_forever, args=(0.05,), daemon=True).start()
        environment = os.environ | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{between.server_address[1]}"
        }
        with subprocess.Popen(
            [sys.executable, "-c", SAVE, url], cwd=ROOT, env=environment
        ) as process:
            uploading = between.stalled.wait(60)
            process.kill()
        between.ended.set()
        between.shutdown()
    assert uploading and process.returncode == -signal.SIGKILL
    assert newest_checkpoint(url) == before
