"""The only door to ray.train: run one function on n training processes and bring back rank 0's result.

Ray's own checkpoints, reports and restarts are not used: `report()` is a slow barrier, its restart forgets what it has
not yet polled, and it retries errors that cannot go away. A group that lost a process is started anew here, and the
function resumes from hemoco's newest checkpoint.
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
from hemoco.errors import HemocoError, LostLoaderError, StorageError, TrainingError, memory_errors
from hemoco.storage.objects import filesystem, join_url, list_names, remove
from pipeline.workers.capacity import wait_for_room
from pipeline.workers.interruption import TrainingProcess, note_sigterm
from pipeline.workers.tasks import Interrupted

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3
_LESS_MEMORY = (
    "take more workers or machines with more memory: the same words go on from the last checkpoint"
)


class GroupSize:
    """How many processes a training may have, and whether it has them.

    Args:
        resources: what one process needs, and how many are wished for.
        allowed: numbers of processes with which it computes the same.
    """

    def __init__(self, resources: ResourcesConfig, allowed: Sequence[int]) -> None:
        self.resources, self.allowed = resources, list(allowed)
        self.whole = threading.Event()
        """Set while it runs with as many as were wished for: what others leave free is not wanted then."""


def run_workers(
    function: Callable[[Any, TrainingProcess], Any],
    job: Any,
    *,
    name: str,
    size: GroupSize,
    storage: str,
) -> Any:
    """What `function(job, process)` returns on rank 0, run on every training process in one process group.

    After a loss it goes on with as many processes as fit the cluster then, and with more when there is room again. A
    function that returns `Interrupted` is begun again.

    Args:
        function: of an importable module; resumes by itself when it was interrupted.
        job: its argument; must pickle.
        name: shows in Ray's lists.
        size: of the group; follows what becomes of it.
        storage: URL of the training's folder, which all nodes reach: its checkpoints, and Ray's marker files.

    Raises:
        HemocoError: as `function` raised it; never retried, since the same would happen again. A LostLoaderError is.
        TrainingError: the processes died more than 3 times without a new checkpoint in between.
    """
    failures, lost, saved = 0, False, _checkpoints(storage)
    while True:
        workers = wait_for_room(size.resources, size.allowed, lost=lost)
        begun = _Work(function, job, size.resources, size.allowed)
        try:
            with _noting(size.whole, workers == size.resources.workers):
                result = _fit(begun, name=name, workers=workers, storage=storage)
        except (TrainingFailedError, RayActorError) as error:  # the latter: the controller was lost
            for cause in _causes(error):
                if isinstance(cause, HemocoError) and not isinstance(cause, LostLoaderError):
                    raise cause from None
            if _found_no_room(error):
                continue
            before, saved = saved, _checkpoints(storage)
            failures, lost = failures + 1 if saved == before else 1, True
            reason = str(error).strip().splitlines()[-1][:300]
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
    """What each process runs; pickles."""

    function: Callable[[Any, TrainingProcess], Any]
    job: Any
    resources: ResourcesConfig
    sizes: list[int]


@contextlib.contextmanager
def _noting(event: threading.Event, holds: bool) -> Iterator[None]:
    if holds:
        event.set()
    try:
        yield
    finally:
        event.clear()


def _fit(work: _Work, *, name: str, workers: int, storage: str) -> Any:
    unique = (
        f"{name}-{uuid.uuid4().hex[:8]}"  # a name Ray knows would resume Ray's idea of that run
    )
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
            name=unique,
            storage_path=path,
            storage_filesystem=arrow,
            # not by Ray: what fits the cluster is looked at again before each start
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        return trainer.fit().return_value
    finally:
        try:
            remove(join_url(folder, unique))
        except (
            StorageError
        ) as error:  # the storage may be what the training failed of, which says more
            logger.warning("event=ray_markers_left %s", error)


def _worker(config: dict[str, Any]) -> Any:
    work: _Work = config["work"]
    logging.basicConfig(format="%(message)s")
    for name in ("hemoco", "pipeline"):
        logging.getLogger(name).setLevel(logging.INFO)  # Ray brings the lines to the driver
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with memory_errors(lambda: f"rank {rank()}, outside of its steps", _LESS_MEMORY):
        return work.function(work.job, TrainingProcess(get_device(), work.resources, work.sizes))


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Leaves Ctrl-C alone: Ray's handler swallows it, ends the process with status 0, and stays after the training."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


_TorchBackend: Any = TorchConfig().backend_cls


class _NotingBackend(_TorchBackend):  # type: ignore[misc]  # Ray has no types there
    """Has SIGTERM noted in each process: the training runs in a thread, which cannot, and Ray's own handler ends it."""

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(note_sigterm)


@dataclasses.dataclass
class _TorchConfig(TorchConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[_NotingBackend]:
        return _NotingBackend


def _checkpoints(storage: str) -> list[str]:
    return list_names(join_url(storage, "checkpoints"))


def _found_no_room(error: TrainingFailedError) -> bool:
    """Whether others took the place between our look at the cluster and the start."""
    return (
        type(getattr(error, "controller_failure", None)).__name__
        == "WorkerGroupStartupTimeoutError"
    )


def _arrow_filesystem(url: str) -> tuple[FileSystem, str]:
    """Arrow's view of our own filesystem: arrow's S3 client fails on servers without directory markers."""
    made, path = filesystem(url)
    return PyFileSystem(FSSpecHandler(made)), path


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception of Ray Train and everything it wraps."""
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
