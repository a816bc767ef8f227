"""The only door to ray.train: runs a function on n training processes, returns rank 0's result.

Ray's own checkpoints, reports and restarts are not used. `report()` is a slow barrier, a restart
loses reports that were not yet polled, and errors are retried that would occur again. Here, a group
that lost a process is started anew, and the function resumes from hemoco's newest checkpoint.
"""

import contextlib
import dataclasses
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from hemoco.config import ResourcesConfig
from hemoco.distributed import rank
from hemoco.errors import (
    HemocoError,
    LostLoaderError,
    StorageError,
    TrainingError,
    last_line,
    memory_errors,
)
from hemoco.storage.objects import filesystem, join_url, list_names, remove
from pipeline.workers.capacity import wait_for_capacity
from pipeline.workers.interruption import TrainingProcess, note_sigterm
from pipeline.workers.tasks import Interrupted

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3
"""Starts that may fail in a row without a new checkpoint."""
_LESS_MEMORY = (
    "take more workers or machines with more memory; "
    "the same command resumes from the last checkpoint"
)


class GroupSize:
    """Number of processes that a training may have, and whether it has all of them.

    Args:
        resources: resources of one process, and the requested number of processes.
        allowed: numbers of processes with which the training computes the same.
    """

    def __init__(self, resources: ResourcesConfig, allowed: Sequence[int]) -> None:
        self.resources, self.allowed = resources, list(allowed)
        self.full = threading.Event()
        """Set while the requested number runs; only then may other work take free resources."""


def run_workers(
    function: Callable[[Any, TrainingProcess], Any],
    job: Any,
    *,
    name: str,
    size: GroupSize,
    storage: str,
) -> Any:
    """Runs `function(job, process)` on every training process and returns rank 0's result.

    The processes form one process group. After a loss of processes, and when the function returns
    `Interrupted`, it is started again with as many processes as fit the cluster.

    Args:
        function: function of an importable module, which resumes by itself.
        job: its argument; it is pickled.
        name: name in Ray's lists.
        size: size of the group; its event `full` is kept up to date.
        storage: URL of the training's folder, which all nodes can reach. It has the checkpoints,
            and Ray writes marker files there.

    Raises:
        HemocoError: the error of `function`. It would occur again, so it is not retried, except
            for a LostLoaderError.
        TrainingError: the processes died more than 3 times without a new checkpoint in between.
    """
    failures, lost = 0, False
    saved = _checkpoints(storage)
    work = _Work(function, job, size.resources, size.allowed)
    while True:
        workers = wait_for_capacity(size.resources, size.allowed, lost=lost)
        try:
            with _set_during(size.full, workers == size.resources.workers):
                result = _fit(work, name=name, workers=workers, storage=storage)
        # Ray Train raises a RayActorError if its controller, an actor of its own, is lost.
        except (TrainingFailedError, RayActorError) as error:
            for cause in _causes(error):
                if isinstance(cause, HemocoError) and not isinstance(cause, LostLoaderError):
                    raise cause from None
            if _startup_timed_out(error):
                continue
            saved_before, saved = saved, _checkpoints(storage)
            failures = failures + 1 if saved == saved_before else 1
            lost = True
            reason = last_line(error)
            if failures > _MAX_FAILURES:
                raise TrainingError(
                    f"{name}: the training processes failed {failures} times, last: {reason}"
                ) from error
            logger.warning("event=restart name=%s attempt=%d reason=%s", name, failures, reason)
        else:
            if not isinstance(result, Interrupted):
                return result
            lost = True
            logger.warning(
                "event=interrupted name=%s step=%d reason=%s", name, result.step, result.reason
            )


class _Work(NamedTuple):
    """The function that each process runs, with its arguments; it is pickled."""

    function: Callable[[Any, TrainingProcess], Any]
    job: Any
    resources: ResourcesConfig
    sizes: list[int]


@contextlib.contextmanager
def _set_during(event: threading.Event, condition: bool) -> Iterator[None]:
    """Sets an event until the block ends, if a condition holds."""
    if condition:
        event.set()
    try:
        yield
    finally:
        event.clear()


def _fit(work: _Work, *, name: str, workers: int, storage: str) -> Any:
    # A name that Ray has seen before would make it resume its own state of that run.
    unique_name = f"{name}-{uuid.uuid4().hex[:8]}"
    folder = join_url(storage, "ray")
    arrow, path = _arrow_filesystem(folder)
    resources = work.resources
    trainer = _Trainer(
        _worker,
        train_loop_config={"work": work},
        torch_config=_TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                "GPU": resources.gpus_per_worker,
            },
        ),
        run_config=RunConfig(
            name=unique_name,
            storage_path=path,
            storage_filesystem=arrow,
            # Ray must not restart the group by itself: the size that fits the cluster is decided
            # before each start, in run_workers.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        return trainer.fit().return_value
    finally:
        try:
            remove(join_url(folder, unique_name))
        except StorageError as error:
            # must not replace the error of the training, which the storage may have caused
            logger.warning("event=ray_markers_left %s", error)


def _worker(config: dict[str, Any]) -> Any:
    work: _Work = config["work"]
    logging.basicConfig(format="%(message)s")
    for name in ("hemoco", "pipeline"):
        logging.getLogger(name).setLevel(logging.INFO)  # Ray prints the lines at the driver
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with memory_errors(lambda: f"rank {rank()}, outside of its steps", _LESS_MEMORY):
        return work.function(work.job, TrainingProcess(get_device(), work.resources, work.sizes))


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's trainer without its handler of Ctrl-C.

    That handler swallows the KeyboardInterrupt, ends the process with status 0, and stays installed
    after the training. tests/unit/test_private_apis.py fails when Ray renames the method.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


_TorchBackend: Any = TorchConfig().backend_cls


class _SigtermBackend(_TorchBackend):  # type: ignore[misc]  # Ray has no types there
    """Ray's torch backend, which also installs our SIGTERM handler in each process.

    Ray runs the training function in a thread, where no handler can be installed, and Ray's own
    handler would end the process before the training could save a checkpoint. `execute` runs in
    the main thread.
    """

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(note_sigterm)


@dataclasses.dataclass
class _TorchConfig(TorchConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[_SigtermBackend]:
        return _SigtermBackend


def _checkpoints(storage: str) -> list[str]:
    return list_names(join_url(storage, "checkpoints"))


def _startup_timed_out(error: TrainingFailedError) -> bool:
    """Returns whether other work took the resources between wait_for_capacity and the start."""
    failure = getattr(error, "controller_failure", None)
    # compared by name: Ray does not export the class
    return type(failure).__name__ == "WorkerGroupStartupTimeoutError"


def _arrow_filesystem(url: str) -> tuple[FileSystem, str]:
    """Wraps our filesystem for Arrow and returns it with the URL's path.

    Arrow's own S3 client fails on servers that have no directory markers.
    """
    fsspec_filesystem, path = filesystem(url)
    return PyFileSystem(FSSpecHandler(fsspec_filesystem)), path


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception of Ray Train and everything it wraps."""
    failures = getattr(error, "worker_failures", {})
    inner = [
        *failures.values(),
        error.__cause__,
        getattr(error, "cause", None),
        getattr(error, "_base_exc", None),
    ]
    yield error
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            yield from _causes(cause)
