"""Faults of a host: memory, /dev/shm, folders that cannot be written."""

import contextlib
import dataclasses
import logging
import math
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hemoco.config import (
    StreamConfig,
    ViewsConfig,
)
from hemoco.data.shards.index import read_index
from hemoco.data.stream.bad_samples import BadSample, BadSampleFile
from hemoco.data.stream.batches import Batch, batches, pretraining_plan
from hemoco.data.stream.loader import StreamPosition
from hemoco.errors import LostLoaderError, TrainingError, UsageError, memory_errors
from hemoco.train.pretrain import build_state, train_steps
from pipeline.pretrain import Pretrained, PretrainJob, pretrain_worker
from pipeline.workers import run_lock
from pipeline.workers.run_lock import only_driver
from pipeline.workers.tasks import attempt_tasks
from tests.helpers.small_pretraining import (
    CONFIG,
    CPU,
    ROOT,
    Troubled,
    losses,
    new_job,
    python,
    same_result,
    write_images,
)

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")


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


# memory

PRETRAIN = """
import logging, pickle, resource, sys
from tests.helpers import small_pretraining as here
from pipeline.pretrain import pretrain_worker
from hemoco.errors import HemocoError
logging.basicConfig(level=logging.INFO)
def trouble():
    if sys.argv[2] == "memory":
        used = int(open("/proc/self/status").read().partition("VmData:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 150 * 2**20, resource.RLIM_INFINITY))
try:
    pretrain_worker(pickle.load(open(sys.argv[1], "rb")), here.Troubled(trouble, after=5))
except HemocoError as error:
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.exit(f"{type(error).__name__}: {error}")
"""


def pretrain_elsewhere(
    job: PretrainJob, folder: Path, trouble: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Runs a pretraining in a process of its own, with one fault."""
    (folder / "job").write_bytes(pickle.dumps(job))
    return python("-c", PRETRAIN, str(folder / "job"), trouble, **environment)


def test_memory_that_runs_out_names_step_size_and_checkpoint_and_the_run_goes_on(
    job: PretrainJob, tmp_path: Path
) -> None:
    larger = dataclasses.replace(CONFIG, views=ViewsConfig(size=64))
    job = dataclasses.replace(job, config=larger)
    done = pretrain_elsewhere(job, tmp_path, "memory", MALLOC_MMAP_THRESHOLD_="4096")
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith("TrainingError: out of memory at step 6: "), (
        done.stderr
    )
    assert re.search(
        r"allocate \d+ bytes.*; this process holds .* GB of the machine are free; "
        r"take more workers",
        said,
    )
    assert said.endswith(f"the last good checkpoint: {job.url}/checkpoints/step_00000004_a0")
    pretrain_worker(job, Troubled())
    assert {step for step, _ in losses(job)} == set(range(1, 9))


def test_memory_that_runs_out_in_the_reading_names_what_was_read(shards: str) -> None:
    done = read(shards, size=1024, memory="20000000")
    said = done.stderr.splitlines()[-1]
    assert said.startswith("TrainingError: out of memory at reading ahead of epoch 0 step 0: "), (
        done.stderr
    )
    assert "lower stream.memory_bytes or stream.workers" in said


# with two killed, a tensor is usually being received from one of them
@pytest.mark.parametrize("killed", [1, 2])
def test_a_loader_process_that_the_kernel_kills_is_named(shards: str, killed: int) -> None:
    plan = dataclasses.replace(
        pretraining_plan(CONFIG), stream=StreamConfig(workers=2, lanes=4), epochs=1000
    )
    listed = BadSampleFile("memory://unwritten")
    found = batches(
        shards,
        read_index(shards),
        "train",
        plan,
        rank=0,
        world_size=1,
        start=None,
        device=CPU,
        bad_samples=listed,
    )
    with contextlib.closing(found):
        next(found)
        for child in multiprocessing.active_children()[:killed]:
            os.kill(child.pid or 0, signal.SIGKILL)
        with pytest.raises(
            LostLoaderError,
            match=r"a loader process was lost .*memory ran out.*lower stream\.memory",
        ):
            list(found)


def test_a_unit_that_lost_a_loader_process_is_tried_again(ray_cluster: str, tmp_path: Path) -> None:
    def unit(
        folder: Path,
    ) -> str:  # here, so that it travels by value: workers do not find the tests
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
    expected = (
        r"out of memory at step 7: .*; this process holds .* GB .*; buy more"
        if ours
        else str(error)
    )
    with (
        pytest.raises(TrainingError if ours else type(error), match=expected),
        memory_errors(lambda: "step 7", "buy more"),
    ):
        raise error


# /dev/shm

READ = """
import dataclasses, resource, sys, torch
from hemoco.config import MoCoConfig, PretrainConfig, StreamConfig, ViewsConfig
from hemoco.data.shards.index import read_index
from hemoco.data.stream.bad_samples import BadSampleFile
from hemoco.data.stream.batches import batches, pretraining_plan
from hemoco.errors import HemocoError
url, size, workers, memory = sys.argv[1], *map(int, sys.argv[2:])
moco, stream = MoCoConfig(queue_length=64, bn_group_size=2), StreamConfig(workers=workers, lanes=4)
views = ViewsConfig(size=size)
config = PretrainConfig(epochs=1, global_batch_size=16, views=views, moco=moco, stream=stream)
listed, cpu = BadSampleFile("memory://unwritten"), torch.device("cpu")
if memory:
    used = int(open("/proc/self/status").read().partition("VmData:")[2].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, resource.RLIM_INFINITY))
try:
    plan = pretraining_plan(config)
    index = read_index(url)
    alone = dict(rank=0, world_size=1, start=None, device=cpu)
    found = batches(url, index, "train", plan, bad_samples=listed, **alone)
    print(sum(len(batch.keys) for batch in found))
except HemocoError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def read(
    shards: str, *, size: int, workers: int = 0, memory: str = "0", before: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Reads an epoch in a process of its own."""
    return python("-c", READ, shards, str(size), str(workers), memory, before=before)


def test_a_dev_shm_too_small_for_buffers_is_named_with_what_is_needed_and_what_to_set(
    shards: str,
) -> None:
    small = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    done = read(shards, size=128, workers=1, before=small)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith(
        "TrainingError: /dev/shm is full: a process that reads needs"
    ), said
    assert "needs 4 buffers of 1572864 bytes there" in said  # 16 images x 2 crops x 3 x 128 x 128
    assert "docker --shm-size" in said and "set stream.workers to 0" in said
    assert read(shards, size=128, workers=0, before=small).stdout == "128\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dev_shm_without_room_for_a_lock_is_named(shards: str, workers: int) -> None:
    full = "mount -t tmpfs -o size=1m tmpfs /dev/shm && head -c 1048576 /dev/zero > /dev/shm/other"
    done = read(shards, size=16, workers=workers, before=full)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith("TrainingError: /dev/shm is full: "), (
        done.stderr
    )
    assert "needs locks there, 0 bytes are free" in said and "or remove what fills it" in said


# folders that cannot be written, and floods of bad samples


@pytest.fixture(params=["no folder", "read-only"])
def no_home(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Sets $HEMOCO_HOME to a folder that cannot be created, or that is read-only."""
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
    ray_cluster: str,
    no_home: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_lock, "_GONE_S", 1.0)
    with (
        only_driver("homeless"),
        pytest.raises(UsageError, match="'homeless' is in use by another process"),
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


# numbers that are not finite


def test_gradients_that_are_not_finite_stop_before_weights_that_no_checkpoint_may_hold() -> None:
    state = build_state(CONFIG, CPU, data_digest="d")
    crops = torch.randint(256, (4, 16, 2, 3, 16, 16), dtype=torch.uint8)
    steps = train_steps(
        state, (Batch(c, ["k"] * 16, StreamPosition(0, i)) for i, c in enumerate(crops)), 4
    )
    next(steps)
    state.model.query_encoder.head[2].weight.register_hook(lambda gradient: gradient * math.nan)
    before = [parameter.clone() for parameter in state.model.query_encoder.parameters()]
    with pytest.raises(
        TrainingError, match=r"the gradients' norm is nan at step 2 .*lower pretrain\.optimizer\.lr"
    ):
        next(steps)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, state.model.query_encoder.parameters(), strict=True)
    )
    assert state.step == 1
