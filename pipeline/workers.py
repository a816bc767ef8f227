"""The only door to ray.train: run one function on n training processes and bring back rank 0's result.

Ray's own checkpoints, reports and restarts are not used: `report()` is a slow barrier, its restart forgets what it has
not yet polled, and it retries errors that cannot go away. A group that lost a process is started anew here, and the
function resumes from hemoco's newest checkpoint.
"""

import dataclasses
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from hemoco.config import ResourcesConfig
from hemoco.errors import HemocoError, TrainingError
from hemoco.storage import filesystem, join_url, remove

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3
_REPLACEMENT_S = 20.0
_POLL_S = 0.5
_QUEUED_S = "86400"


def run_workers(
    function: Callable[[Any], Any],
    job: Any,
    *,
    name: str,
    resources: ResourcesConfig,
    sizes: Sequence[int],
    storage: str,
) -> Any:
    """What `function(job)` returns on rank 0, run on every training process in one process group.

    After a loss it goes on with as many processes as fit the cluster then.

    Args:
        function: of an importable module; resumes by itself when it was interrupted.
        job: its argument; must pickle.
        name: shows in Ray's lists.
        resources: processes, CPUs and GPUs.
        sizes: numbers of processes it may go on with after a loss.
        storage: URL of a folder all nodes reach, for Ray's marker files.

    Raises:
        HemocoError: as `function` raised it; never retried, since the same would happen again.
        TrainingError: the processes died more than 3 times.
    """
    for attempt in range(_MAX_FAILURES + 1):
        if attempt:
            resources = dataclasses.replace(resources, workers=_size_after_loss(resources, sizes))
        try:
            return _fit(function, job, name=name, resources=resources, storage=storage)
        except TrainingFailedError as error:
            for cause in _causes(error):
                if isinstance(cause, HemocoError):
                    raise cause from None
            reason = str(error).strip().splitlines()[-1][:300]
            if attempt == _MAX_FAILURES:
                raise TrainingError(
                    f"{name}: the training processes failed {attempt + 1} times, last: {reason}"
                ) from error
            logger.warning("event=restart name=%s attempt=%d reason=%s", name, attempt + 1, reason)
    raise AssertionError("unreachable")


def _size_after_loss(resources: ResourcesConfig, sizes: Sequence[int]) -> int:
    """The largest allowed number of processes that fits; the cluster gets some time to be whole again."""
    deadline = time.monotonic() + _REPLACEMENT_S
    while (fitting := _fitting(resources, ray.available_resources())) < resources.workers:
        if time.monotonic() > deadline:
            size = max((size for size in sizes if size <= fitting), default=resources.workers)
            logger.warning("event=world_size from=%d to=%d fitting=%d", resources.workers, size, fitting)
            return size
        time.sleep(_POLL_S)
    return resources.workers


def _fitting(resources: ResourcesConfig, free: dict[str, float]) -> int:
    """Processes that free resources suffice for."""
    needs = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    return int(min(free.get(kind, 0.0) // need for kind, need in needs.items() if need))


def worker_device() -> torch.device:
    """The device Ray gave this training process."""
    device: torch.device = get_device()
    return device


def _fit(function: Callable[[Any], Any], job: Any, *, name: str, resources: ResourcesConfig, storage: str) -> Any:
    # beside other transfers a group waits until these let go of their cores; Ray would try anew each minute, and say so
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _QUEUED_S)
    unique = f"{name}-{uuid.uuid4().hex[:8]}"  # a name Ray knows would resume Ray's idea of that run
    folder = join_url(storage, "ray")
    arrow, path = _arrow_filesystem(folder)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"function": function, "job": job},
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=unique,
            storage_path=path,
            storage_filesystem=arrow,
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        return trainer.fit().return_value
    finally:
        remove(join_url(folder, unique))


def _worker(config: dict[str, Any]) -> Any:
    logging.basicConfig(format="%(message)s")
    for name in ("hemoco", "pipeline"):
        logging.getLogger(name).setLevel(logging.INFO)  # Ray brings the lines to the driver
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return config["function"](config["job"])


def _arrow_filesystem(url: str) -> tuple[FileSystem, str]:
    """Arrow's view of our own filesystem: arrow's S3 client fails on servers without directory markers."""
    made, path = filesystem(url)
    return PyFileSystem(FSSpecHandler(made)), path


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception of Ray Train and everything it wraps."""
    failures = getattr(error, "worker_failures", {})
    inner = [*failures.values(), error.__cause__, getattr(error, "cause", None), getattr(error, "_base_exc", None)]
    yield error
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            yield from _causes(cause)
