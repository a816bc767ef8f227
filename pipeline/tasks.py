"""Many small Ray tasks, their results as they get ready."""

from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from hemoco.errors import HemocoError

ResultT = TypeVar("ResultT")


class Progress(NamedTuple):
    """How far work over shards is."""

    done: int
    total: int


def run_tasks(
    function: Callable[..., ResultT], arguments: Iterable[tuple[Any, ...]], *, cpus: int = 1, gpus: int = 0
) -> Generator[ResultT, None, None]:
    """Yields what the function returns on Ray workers, in any order; closing it stops the rest.

    After an error no more are begun, and those that run come to their end before it is raised.

    Args:
        function: of an importable module.
        arguments: of each call.
        cpus: cores of each call.
        gpus: GPUs of each call.

    Raises:
        HemocoError: as the function raised it, or workers were lost again and again.
    """
    import ray  # seconds to import, and what only names the progress does without

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(function)
    waiting = iter(arguments)
    # some more than cores, so that no core waits for this process
    in_flight = int(ray.cluster_resources().get("CPU", 1)) + 2
    running = [task.remote(*words) for words in islice(waiting, in_flight)]
    try:
        while running:
            (ready,), running = ray.wait(running)
            running += [task.remote(*words) for words in islice(waiting, 1)]
            yield _result(ready)
    except HemocoError:
        if running:
            ray.wait(running, num_returns=len(running))  # so that whoever cleans up finds all that they wrote
        running = []
        raise
    finally:
        for reference in running:
            ray.cancel(reference)


def finish(steps: Generator[Progress, None, ResultT]) -> ResultT:
    """What steps return in the end."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: ResultT = done.value
            return result


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HemocoError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HemocoError(f"a Ray worker was lost ({reason}); run the same command again") from error
