"""Ray tasks whose results are returned as they finish, with retries of what is transient."""

import logging
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from tenacity import RetryCallState

from hemoco.errors import HemocoError, LostLoaderError, StorageError, TrackingError, first_line
from hemoco.storage.retry import RetryPolicy, retrying

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
_POLL_S = 1.0


class Progress(NamedTuple):
    """Progress of work over shards."""

    done: int
    total: int


class Outcome(NamedTuple):
    """Outcome of one call: its result or its error."""

    arguments: tuple[Any, ...]
    result: Any
    error: HemocoError | None


class LostWorkerError(HemocoError):
    """A Ray worker ended without an error: killed, out of memory, or its node is gone."""


class CancelledError(HemocoError):
    """The work was cancelled because its run is stopping."""


def run_tasks(
    function: Callable[..., ResultT],
    arguments: Iterable[tuple[Any, ...]],
    *,
    cpus: int = 1,
    gpus: int = 0,
) -> Generator[ResultT, None, None]:
    """Calls a function on Ray workers and yields its results, in any order.

    After an error no more calls are started, and the error is raised when the running ones have
    ended. Closing the generator cancels the rest.

    Args:
        function: function of an importable module.
        arguments: arguments of each call.
        cpus: cores of each call.
        gpus: GPUs of each call.

    Raises:
        HemocoError: the error of a call, or workers were lost in all attempts of a call.
    """
    import ray  # takes seconds, and modules that import only `Progress` do not need it

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_ATTEMPTS - 1)(function)
    waiting = iter(arguments)
    # Not all at once, since there may be a task for each of thousands of shards; a few more than
    # there are cores, so that no core waits for this process.
    in_flight = int(ray.cluster_resources().get("CPU", 1)) + 2
    running = [task.remote(*call) for call in islice(waiting, in_flight)]
    try:
        while running:
            (ready,), running = ray.wait(running)
            running += [task.remote(*call) for call in islice(waiting, 1)]
            yield _result(ready)
    except HemocoError:
        # The caller may clean up: after this, no task writes anything more.
        if running:
            ray.wait(running, num_returns=len(running))
        running = []
        raise
    finally:
        # By force: an interrupt during `import torch` would leave the worker broken for its next
        # task.
        for reference in running:
            ray.cancel(reference, force=True)


def attempt_tasks(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    *,
    cpus: int,
    gpus: int,
    stopping: threading.Event,
) -> Generator[Outcome, None, None]:
    """Calls a function on Ray workers and yields the outcome of every call, in any order.

    A call that fails does not affect the others. Transient errors (a lost worker or loader, storage
    or MLflow that did not answer) are retried twice. A call that returns `Interrupted` is started
    again.

    Args:
        function: function of an importable module.
        arguments: arguments of each call.
        cpus: cores of each call.
        gpus: GPUs of each call.
        stopping: when set, running calls are cancelled.

    Raises:
        CancelledError: `stopping` was set.
    """
    import ray

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(function)
    running = {task.remote(*call): (call, 0) for call in arguments}
    try:
        while running:
            ready, _ = ray.wait(list(running), timeout=_POLL_S)
            if stopping.is_set():
                raise CancelledError("cancelled with its run")
            for reference in ready:
                call, failures = running.pop(reference)
                outcome = _outcome(reference, call)
                error = outcome.error
                if isinstance(outcome.result, Interrupted):
                    running[task.remote(*call)] = call, failures
                elif error is not None and failures + 1 < _ATTEMPTS and _is_transient(error):
                    logger.warning("event=retry attempt=%d reason=%s", failures + 2, error)
                    running[task.remote(*call)] = call, failures + 1
                else:
                    yield outcome
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def try_again(call: Callable[[], Any], arguments: tuple[Any, ...]) -> Outcome:
    """Returns the outcome of a call in this process, with the retries of `attempt_tasks`.

    Args:
        call: the call.
        arguments: its arguments, which the outcome names.
    """
    try:
        result = retrying(_RETRIES).copy(before_sleep=_log_retry)(call)
    except HemocoError as error:
        return Outcome(arguments, None, error)
    return Outcome(arguments, result, None)


def _is_transient(error: BaseException | None) -> bool:
    return isinstance(error, StorageError | TrackingError | LostLoaderError | LostWorkerError)


_ATTEMPTS = 3
_RETRIES = RetryPolicy(is_transient=_is_transient, first_wait_s=0.0, max_attempts=_ATTEMPTS)


def _log_retry(state: RetryCallState) -> None:
    assert state.outcome is not None
    logger.warning(
        "event=retry attempt=%d reason=%s", state.attempt_number + 1, state.outcome.exception()
    )


def _outcome(reference: Any, arguments: tuple[Any, ...]) -> Outcome:
    import ray

    try:
        return Outcome(arguments, _result(reference), None)
    except HemocoError as error:
        return Outcome(arguments, None, error)
    except ray.exceptions.RayTaskError as error:
        logger.debug("%s", error)  # with the traceback of the worker
        cause = error.cause
        reason = f"{type(cause).__name__}: {first_line(cause)} (this looks like a bug)"
        return Outcome(arguments, None, HemocoError(reason))


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HemocoError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = first_line(error)
        raise LostWorkerError(
            f"a Ray worker was lost ({reason}); run the same command again"
        ) from error


Reason = Literal["stopped", "preempted", "grow"]


class Interrupted(NamedTuple):
    """Returned by a training that saved a checkpoint and stopped, to be started again."""

    reason: Reason
    step: int
    """Optimiser steps done."""


class Finding(NamedTuple):
    """A reason that occurred once or more, for example for which images were left out."""

    reason: str
    times: int
    first: str
    """Name of the first item for which it occurred."""


def count_reasons(cases: Iterable[tuple[str, str]]) -> list[Finding]:
    """Counts (name, reason) pairs; returns one finding for each reason, sorted by reason."""
    return unite_findings(Finding(reason, 1, name) for name, reason in cases)


def unite_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Adds up the findings of several tasks; returns one for each reason, sorted by reason."""
    united: dict[str, Finding] = {}
    for finding in findings:
        known = united.get(finding.reason)
        times = finding.times if known is None else known.times + finding.times
        united[finding.reason] = (known or finding)._replace(times=times)
    return [united[reason] for reason in sorted(united)]
