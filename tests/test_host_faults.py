"""Faults of a host and of what it stands on: memory, /dev/shm, folders that cannot be written, a storage that goes."""

import contextlib
import dataclasses
import logging
import math
import multiprocessing
import os
import pickle
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import s3fs
import torch
from mlflow import MlflowClient
from shard_folders import write_shards

from cluster.servers import BUCKET, S3Server, s3_environment, s3_server
from hemoco.checkpoint import load_backbone, newest_checkpoint, save_checkpoint
from hemoco.config import (
    DataConfig,
    EncoderConfig,
    MoCoConfig,
    PretrainConfig,
    ResourcesConfig,
    StreamConfig,
    ViewsConfig,
)
from hemoco.data.counts import BadSample, BadSampleFile
from hemoco.data.loader import StreamPosition
from hemoco.data.stream import Batch, batches, pretraining_plan
from hemoco.errors import StorageError, TrainingError, UsageError
from hemoco.memory import LostLoaderError, memory_errors
from hemoco.storage import list_names
from hemoco.tracking import connect, open_run
from hemoco.train import TrainState, build_state, train_steps
from pipeline import run_lock
from pipeline.interrupted import Reason
from pipeline.interruption import TrainingProcess
from pipeline.pretrain import Pretrained, PretrainJob, pretrain_worker
from pipeline.run_lock import only_driver
from pipeline.tasks import attempt_tasks

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CONFIG = PretrainConfig(
    epochs=1,
    global_batch_size=16,
    log_every_steps=1,
    checkpoint_every_steps=2,
    knn_every_epochs=0,
    export_every_epochs=0,
    views=ViewsConfig(size=16),
    encoder=EncoderConfig(architecture="resnet10t", stem="small"),
    moco=MoCoConfig(embedding_size=8, queue_length=64, bn_group_size=4),
    stream=StreamConfig(workers=0, lanes=4),
)


class Troubled(TrainingProcess):
    """A training process to whose host something happens after a step, before its checkpoint is written."""

    def __init__(self, trouble: Callable[[], None] = lambda: None, *, after: int = 4) -> None:
        super().__init__(CPU, ResourcesConfig(), [1])
        self._trouble, self._left = trouble, after

    def interruption(self, *, at_checkpoint: bool) -> Reason | None:
        self._left -= 1
        if self._left == 0:
            self._trouble()
        return super().interruption(at_checkpoint=at_checkpoint)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards").as_uri(), [32, 32, 32, 32])


@pytest.fixture
def job(shards: str, tracking: str, tmp_path: Path) -> PretrainJob:
    """A pretraining of 8 steps with a checkpoint after every second one."""
    run_id = open_run(tracking, connect(tracking), name=uuid.uuid4().hex, parent=None, tags={}, params={})
    url = (tmp_path / "run").as_uri()
    return PretrainJob(config=CONFIG, data=DataConfig(shards=shards), url=url, tracking_uri=tracking, run_id=run_id)


@pytest.fixture(scope="module")
def unbroken(shards: str, tracking: str, tmp_path_factory: pytest.TempPathFactory) -> PretrainJob:
    """That pretraining, undisturbed."""
    run_id = open_run(tracking, connect(tracking), name="unbroken", parent=None, tags={}, params={})
    url = tmp_path_factory.mktemp("unbroken").as_uri()
    job = PretrainJob(config=CONFIG, data=DataConfig(shards=shards), url=url, tracking_uri=tracking, run_id=run_id)
    pretrain_worker(job, Troubled())
    return job


def same_result(job: PretrainJob, other: PretrainJob) -> bool:
    """Whether backbones are equal bit for bit, and all losses of all attempts."""
    found, wanted = (load_backbone(f"{each.url}/backbone.safetensors").state_dict() for each in (job, other))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    return losses(job) == losses(other)


def losses(job: PretrainJob) -> set[tuple[int, float]]:
    history = MlflowClient(job.tracking_uri).get_metric_history(job.run_id, "loss")
    return {(point.step, point.value) for point in history}


class Storage:
    """An S3 server that can be stopped and started again on the same port."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch, self._port = folder, patch, 0
        self._stack = contextlib.ExitStack()
        self.server: S3Server

    def start(self) -> None:
        self.server = self._stack.enter_context(s3_server(self._folder, port=self._port))
        self._port = int(self.server.endpoint.rpartition(":")[2])
        for name, value in s3_environment(self.server).items():  # its key is a new one
            self._patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    def stop(self) -> None:
        self._stack.close()


class Stalling(socketserver.ThreadingTCPServer):
    """Before a server, passes bytes on until one connection has sent a megabyte; `stalled` says that it has."""

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


def python(*words: str, before: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python in the checkout, behind a command of the shell."""
    command = [sys.executable, *words]
    if before:
        command = ["unshare", "-m", "sh", "-c", f'{before} && exec "$@"', "sh", *command]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )


# a storage that goes


def test_storage_that_stops_while_a_checkpoint_is_due_ends_the_run_in_one_line_and_nothing_is_lost(
    job: PretrainJob, unbroken: PretrainJob, storage: Storage
) -> None:
    impatient = dataclasses.replace(job.config, stream=dataclasses.replace(job.config.stream, retry_s=3.0))
    job = dataclasses.replace(job, url=f"s3://{BUCKET}/run", config=impatient)
    with pytest.raises(StorageError, match=r"/run/checkpoints/step_00000004_a0/.* can be reached") as ended:
        pretrain_worker(job, Troubled(storage.stop))
    assert "\n" not in str(ended.value)
    storage.start()
    assert list_names(f"{job.url}/checkpoints") == ["step_00000002_a0"]
    pretrain_worker(job, Troubled())
    assert same_result(job, unbroken)


RECIPE = """
import dataclasses
from hemoco.config import DataConfig, Recipe, ResourcesConfig
from test_host_faults import CONFIG
pretrain = dataclasses.replace(
    CONFIG, epochs=16, checkpoint_every_steps=8, resources=ResourcesConfig(workers=2),
    stream=dataclasses.replace(CONFIG.stream, retry_s=3.0),
)
recipe = Recipe(name="stopped", data=DataConfig(), pretrain=pretrain)
"""


@pytest.mark.slow
def test_a_storage_that_stops_in_mid_run_ends_the_command_in_one_line_and_the_same_words_go_on(
    storage: Storage, tracking: str, tmp_path: Path
) -> None:
    shards = write_shards(f"s3://{BUCKET}/shards", [32, 32, 32, 32])
    (tmp_path / "stopped.py").write_text(RECIPE)
    words = ["-m", "jobs", "pretrain", str(tmp_path / "stopped.py"), "--run", "stopped", "--data.shards", shards]
    words += ["--storage", f"s3://{BUCKET}/runs"]
    paths = {"PYTHONPATH": str(ROOT / "tests")}
    first = threading.Thread(target=_stop_after_a_checkpoint, args=(storage, tmp_path / "buckets"))
    first.start()
    done = python(*words, **paths)
    first.join()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and f"s3://{BUCKET}/" in line and "can be reached" in line, done.stderr
    assert done.stderr.splitlines()[-1] == line, done.stderr
    storage.start()
    again = python(*words, **paths)
    assert again.returncode == 0 and "resumed from step" in again.stderr + again.stdout, again.stderr


def _stop_after_a_checkpoint(storage: Storage, buckets: Path) -> None:
    deadline = time.monotonic() + 100
    while not list(buckets.glob("*/runs/stopped/pretrain/checkpoints/*/manifest.json")):
        assert time.monotonic() < deadline, "there is no checkpoint"
        time.sleep(0.1)
    storage.stop()


SAVE = """
import sys, torch
from hemoco.checkpoint import save_checkpoint
from hemoco.config import EncoderConfig, PretrainConfig
from hemoco.train import build_state
config = PretrainConfig(encoder=EncoderConfig(architecture="resnet10t"))
state = build_state(config, torch.device("cpu"), data_digest="d")
state.step = 2
save_checkpoint(state, sys.argv[1], attempt=0, keep_last=9)
"""


def test_a_process_killed_in_the_upload_of_a_checkpoint_leaves_the_one_before_as_the_newest(storage: Storage) -> None:
    state, url = small_state(), f"s3://{BUCKET}/checkpoints"
    state.step = 1
    before = save_checkpoint(state, url, attempt=0, keep_last=9)
    with Stalling(storage.server.endpoint) as between:
        threading.Thread(target=between.serve_forever, args=(0.05,), daemon=True).start()
        environment = os.environ | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{between.server_address[1]}"}
        with subprocess.Popen([sys.executable, "-c", SAVE, url], cwd=ROOT, env=environment) as process:
            uploading = between.stalled.wait(60)
            process.kill()
        between.ended.set()
        between.shutdown()
    assert uploading and process.returncode == -signal.SIGKILL
    assert newest_checkpoint(url) == before


def small_state() -> TrainState:
    return build_state(CONFIG, CPU, data_digest="d")


# memory

PRETRAIN = """
import logging, pickle, resource, sys
sys.path.insert(0, "tests")
import test_host_faults as here
from hemoco.errors import HemocoError
logging.basicConfig(level=logging.INFO)
def trouble():
    if sys.argv[2] == "memory":
        used = int(open("/proc/self/status").read().partition("VmData:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 150 * 2**20, resource.RLIM_INFINITY))
try:
    here.pretrain_worker(pickle.load(open(sys.argv[1], "rb")), here.Troubled(trouble, after=5))
except HemocoError as error:
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.exit(f"{type(error).__name__}: {error}")
"""


def pretrain_elsewhere(
    job: PretrainJob, folder: Path, trouble: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """That pretraining in a process of its own."""
    (folder / "job").write_bytes(pickle.dumps(job))
    return python("-c", PRETRAIN, str(folder / "job"), trouble, **environment)


def test_memory_that_runs_out_names_step_size_and_checkpoint_and_the_run_goes_on(
    job: PretrainJob, tmp_path: Path
) -> None:
    larger = dataclasses.replace(CONFIG, views=ViewsConfig(size=64))
    job = dataclasses.replace(job, config=larger)
    done = pretrain_elsewhere(job, tmp_path, "memory", MALLOC_MMAP_THRESHOLD_="4096")
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith("TrainingError: out of memory at step 6: "), done.stderr
    assert re.search(r"allocate \d+ bytes.*; this process holds .* GB of the machine are free; take more workers", said)
    assert said.endswith(f"the last good checkpoint: {job.url}/checkpoints/step_00000004_a0")
    pretrain_worker(job, Troubled())
    assert {step for step, _ in losses(job)} == set(range(1, 9))


def test_memory_that_runs_out_in_the_reading_names_what_was_read(shards: str) -> None:
    done = read(shards, size=1024, memory="20000000")
    said = done.stderr.splitlines()[-1]
    assert said.startswith("TrainingError: out of memory at reading ahead of epoch 0 step 0: "), done.stderr
    assert "lower stream.memory_bytes or stream.workers" in said


def test_a_loader_process_that_the_kernel_kills_is_named(shards: str) -> None:
    plan = dataclasses.replace(pretraining_plan(CONFIG), stream=StreamConfig(workers=2, lanes=4), epochs=1000)
    listed = BadSampleFile("memory://unwritten")
    found = batches(shards, "train", plan, rank=0, world_size=1, start=None, device=CPU, bad_samples=listed)
    with contextlib.closing(found):
        next(found)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        with pytest.raises(LostLoaderError, match=r"a loader process was lost .*memory ran out.*lower stream\.memory"):
            list(found)


def test_a_unit_that_lost_a_loader_process_is_tried_again(ray_cluster: str, tmp_path: Path) -> None:
    def unit(folder: Path) -> str:  # here, so that it travels by value: workers do not find the tests
        (folder / uuid.uuid4().hex).touch()
        if len(list(folder.iterdir())) == 1:
            raise LostLoaderError("a loader process was lost")
        return "done"

    (outcome,) = attempt_tasks(unit, [(tmp_path,)], cpus=1, gpus=0, stopping=threading.Event())
    assert outcome.result == "done"


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_failed_allocations_are_told_from_other_errors(error: Exception, ours: bool) -> None:
    expected = r"out of memory at step 7: .*; this process holds .* GB .*; buy more" if ours else str(error)
    with (
        pytest.raises(TrainingError if ours else type(error), match=expected),
        memory_errors(lambda: "step 7", "buy more"),
    ):
        raise error


# /dev/shm

READ = """
import dataclasses, resource, sys, torch
from hemoco.config import MoCoConfig, PretrainConfig, StreamConfig, ViewsConfig
from hemoco.data.counts import BadSampleFile
from hemoco.data.stream import batches, pretraining_plan
from hemoco.errors import HemocoError
url, size, workers, memory = sys.argv[1], *map(int, sys.argv[2:])
moco, stream = MoCoConfig(queue_length=64, bn_group_size=2), StreamConfig(workers=workers, lanes=4)
config = PretrainConfig(epochs=1, global_batch_size=16, views=ViewsConfig(size=size), moco=moco, stream=stream)
listed, cpu = BadSampleFile("memory://unwritten"), torch.device("cpu")
if memory:
    used = int(open("/proc/self/status").read().partition("VmData:")[2].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, resource.RLIM_INFINITY))
try:
    plan = pretraining_plan(config)
    found = batches(url, "train", plan, rank=0, world_size=1, start=None, device=cpu, bad_samples=listed)
    print(sum(len(batch.keys) for batch in found))
except HemocoError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def read(
    shards: str, *, size: int, workers: int = 0, memory: str = "0", before: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Reads an epoch in a process of its own."""
    return python("-c", READ, shards, str(size), str(workers), memory, before=before)


@pytest.mark.system
def test_a_dev_shm_too_small_for_buffers_is_named_with_what_is_needed_and_what_to_set(shards: str) -> None:
    small = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    done = read(shards, size=128, workers=1, before=small)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith("TrainingError: /dev/shm is full: a process that reads needs"), said
    assert "needs 4 buffers of 1572864 bytes there" in said  # 16 images x 2 crops x 3 x 128 x 128
    assert "docker --shm-size" in said and "set stream.workers to 0" in said
    assert read(shards, size=128, workers=0, before=small).stdout == "128\n"


@pytest.mark.system
@pytest.mark.parametrize("workers", [0, 1])
def test_a_dev_shm_without_room_for_a_lock_is_named(shards: str, workers: int) -> None:
    full = "mount -t tmpfs -o size=1m tmpfs /dev/shm && head -c 1048576 /dev/zero > /dev/shm/other"
    done = read(shards, size=16, workers=workers, before=full)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith("TrainingError: /dev/shm is full: "), done.stderr
    assert "needs locks there, 0 bytes are free" in said and "or remove what fills it" in said


# folders that cannot be written, and floods


@pytest.fixture(params=["no folder", pytest.param("read-only", marks=pytest.mark.system)])
def no_home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """$HEMOCO_HOME on a disk that takes nothing."""
    place = tmp_path / "disk"
    monkeypatch.setenv("HEMOCO_HOME", str(place / "home"))
    if request.param == "no folder":
        place.write_text("a file in its place")
        yield
        return
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", place], check=True)
    yield
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.usefixtures("no_home")
def test_training_does_without_a_home(
    job: PretrainJob, unbroken: PretrainJob, caplog: pytest.LogCaptureFixture
) -> None:
    stream = dataclasses.replace(CONFIG.stream, disk_cache_bytes=10**9)
    job = dataclasses.replace(job, config=dataclasses.replace(CONFIG, stream=stream))
    assert isinstance(pretrain_worker(job, Troubled()), Pretrained)
    assert same_result(job, unbroken)
    assert caplog.text.count("event=shard_not_cached") == 1


def test_a_second_driver_is_refused_by_ray_alone_where_there_is_no_home(
    ray_cluster: str, no_home: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_GONE_S", 1.0)
    with (
        only_driver("homeless"),
        pytest.raises(UsageError, match="'homeless' is being worked at by another process"),
        only_driver("homeless"),
    ):
        pass
    assert "event=run_lock_unwritable run=homeless reason=" in caplog.text
    assert "set HEMOCO_HOME to a folder that can be written" in caplog.text


def test_training_goes_on_where_its_log_cannot_be_written(
    job: PretrainJob, unbroken: PretrainJob, tmp_path: Path
) -> None:
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-c", PRETRAIN, str(tmp_path / "job"), "none"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, timeout=120, check=False)
    assert done.returncode == 0
    assert same_result(job, unbroken)


def test_a_flood_of_bad_samples_is_a_few_lines_of_log_and_a_list_of_bounded_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = BadSampleFile((tmp_path / "bad").as_uri())
    with caplog.at_level(logging.INFO):
        for number in range(30_000):
            listed.add([BadSample("s.tar", str(number), "not an image")])
        listed.close()
    assert len(caplog.records) == 14  # the 1st, 2nd, 4th, ... 8192nd
    assert len((tmp_path / "bad").read_text().splitlines()) == 10_000


# numbers that are none


def test_gradients_that_are_not_finite_stop_before_weights_that_no_checkpoint_may_hold() -> None:
    state = small_state()
    crops = torch.randint(256, (4, 16, 2, 3, 16, 16), dtype=torch.uint8)
    steps = train_steps(state, (Batch(c, ["k"] * 16, StreamPosition(0, i)) for i, c in enumerate(crops)), 4)
    next(steps)
    state.model.query_encoder.head[2].weight.register_hook(lambda gradient: gradient * math.nan)
    before = [parameter.clone() for parameter in state.model.query_encoder.parameters()]
    with pytest.raises(TrainingError, match=r"the gradients' norm is nan at step 2 .*lower pretrain\.optimizer\.lr"):
        next(steps)
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.query_encoder.parameters(), strict=True))
    assert state.step == 1
