"""The only door to ray.train: run one function on n training processes and bring back rank 0's result.

Ray's own checkpoints, reports and restarts are not used: `report()` is a slow barrier, its restart forgets what it has
not yet polled, and it retries errors that cannot go away. A group that lost a process is started anew here, and the
function resumes from hemoco's newest checkpoint.
"""

import dataclasses
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend

from hemoco.config import ResourcesConfig
from hemoco.errors import HemocoError, TrainingError
from hemoco.storage import filesystem, join_url, list_names, remove
from pipeline.interruption import Interrupted, TrainingProcess, note_sigterm
from pipeline.room import wait_for_room

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3


def run_workers(
    function: Callable[[Any, TrainingProcess], Any],
    job: Any,
    *,
    name: str,
    resources: ResourcesConfig,
    sizes: Sequence[int],
    storage: str,
) -> Any:
    """What `function(job, process)` returns on rank 0, run on every training process in one process group.

    After a loss it goes on with as many processes as fit the cluster then, and with more when there is room again. A
    function that returns `Interrupted` is begun again.

    Args:
        function: of an importable module; resumes by itself when it was interrupted.
        job: its argument; must pickle.
        name: shows in Ray's lists.
        resources: processes, CPUs and GPUs.
        sizes: numbers of processes it may have.
        storage: URL of the training's folder, which all nodes reach: its checkpoints, and Ray's marker files.

    Raises:
        HemocoError: as `function` raised it; never retried, since the same would happen again.
        TrainingError: the processes died more than 3 times without a new checkpoint in between.
    """
    failures, lost, saved = 0, False, _checkpoints(storage)
    while True:
        size = wait_for_room(resources, sizes, lost=lost)
        group = {"function": function, "job": job, "resources": resources, "sizes": list(sizes)}
        try:
            result = _fit(group, name=name, workers=size, storage=storage)
        except TrainingFailedError as error:
            for cause in _causes(error):
                if isinstance(cause, HemocoError):
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
            logger.warning("event=interrupted name=%s step=%d reason=%s", name, result.step, result.reason)


def _fit(group: dict[str, Any], *, name: str, workers: int, storage: str) -> Any:
    unique = f"{name}-{uuid.uuid4().hex[:8]}"  # a name Ray knows would resume Ray's idea of that run
    folder = join_url(storage, "ray")
    arrow, path = _arrow_filesystem(folder)
    resources: ResourcesConfig = group["resources"]
    trainer = TorchTrainer(
        _worker,
        train_loop_config=group,
        torch_config=_TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
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
        remove(join_url(folder, unique))


def _worker(group: dict[str, Any]) -> Any:
    logging.basicConfig(format="%(message)s")
    for name in ("hemoco", "pipeline"):
        logging.getLogger(name).setLevel(logging.INFO)  # Ray brings the lines to the driver
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return group["function"](group["job"], TrainingProcess(get_device(), group["resources"], group["sizes"]))


class _NotingBackend(_TorchBackend):  # type: ignore[misc]  # Ray has no types there
    """Has SIGTERM noted in each process: the training runs in a thread, which cannot, and Ray's own handler ends it."""

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(note_sigterm)


@dataclasses.dataclass
class _TorchConfig(TorchConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NotingBackend


def _checkpoints(storage: str) -> list[str]:
    return list_names(join_url(storage, "checkpoints"))


def _found_no_room(error: TrainingFailedError) -> bool:
    """Whether others took the place between our look at the cluster and the start."""
    return type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError"


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
