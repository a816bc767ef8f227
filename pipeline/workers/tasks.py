"""Ray tasks, their results as they get ready."""

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
    """How far work over shards is."""

    done: int
    total: int


class Outcome(NamedTuple):
    """What became of one call."""

    arguments: tuple[Any, ...]
    result: Any
    error: HemocoError | None


class LostWorkerError(HemocoError):
    """A Ray worker ended without a word: killed, out of memory, or its node is gone."""


class CancelledError(HemocoError):
    """The work was given up because the whole run is."""


def run_tasks(
    function: Callable[..., ResultT],
    arguments: Iterable[tuple[Any, ...]],
    *,
    cpus: int = 1,
    gpus: int = 0,
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

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_ATTEMPTS - 1)(function)
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
            ray.wait(
                running, num_returns=len(running)
            )  # so that whoever cleans up finds all that they wrote
        running = []
        raise
    finally:
        for reference in running:
            ray.cancel(
                reference, force=True
            )  # an interrupt in the midst of `import torch` spoils a worker for others


def attempt_tasks(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    *,
    cpus: int,
    gpus: int,
    stopping: threading.Event,
) -> Generator[Outcome, None, None]:
    """Yields what became of every call, in any order: one that fails leaves the others alone.

    What may pass is tried again, twice: a lost worker or loader, storage or MLflow that did not answer. A call that
    returns `Interrupted` is begun again.

    Args:
        function: of an importable module.
        arguments: of each call.
        cpus: cores of each call.
        gpus: GPUs of each call.
        stopping: ends it; what runs is cancelled.

    Raises:
        CancelledError: `stopping` was set.
    """
    import ray

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(function)
    running = {task.remote(*words): (words, 0) for words in arguments}
    try:
        while running:
            ready, _ = ray.wait(list(running), timeout=_POLL_S)
            if stopping.is_set():
                raise CancelledError("cancelled with its run")
            for reference in ready:
                words, failures = running.pop(reference)
                outcome = _outcome(reference, words)
                if isinstance(outcome.result, Interrupted):
                    running[task.remote(*words)] = words, failures
                elif (
                    outcome.error is not None
                    and failures + 1 < _ATTEMPTS
                    and _RETRIES.is_transient(outcome.error)
                ):
                    logger.warning("event=retry attempt=%d reason=%s", failures + 2, outcome.error)
                    running[task.remote(*words)] = words, failures + 1
                else:
                    yield outcome
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def try_again(call: Callable[[], Any], arguments: tuple[Any, ...]) -> Outcome:
    """What became of a call in this process, tried again as by `attempt_tasks`."""
    try:
        return Outcome(arguments, retrying(_RETRIES).copy(before_sleep=_log_retry)(call), None)
    except HemocoError as error:
        return Outcome(arguments, None, error)


def _may_pass(error: BaseException | None) -> bool:
    return isinstance(error, StorageError | TrackingError | LostLoaderError | LostWorkerError)


_ATTEMPTS = 3
_RETRIES = RetryPolicy(is_transient=_may_pass, first_wait_s=0.0, max_attempts=_ATTEMPTS)


def _log_retry(state: RetryCallState) -> None:
    assert state.outcome is not None
    logger.warning(
        "event=retry attempt=%d reason=%s", state.attempt_number + 1, state.outcome.exception()
    )


def _outcome(reference: Any, words: tuple[Any, ...]) -> Outcome:
    import ray

    try:
        return Outcome(words, _result(reference), None)
    except HemocoError as error:
        return Outcome(words, None, error)
    except ray.exceptions.RayTaskError as error:
        logger.debug("%s", error)  # with the traceback of the worker
        cause = error.cause
        return Outcome(
            words,
            None,
            HemocoError(f"{type(cause).__name__}: {first_line(cause)} (this looks like a bug)"),
        )


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
    """A training that stopped before its end: begun again, it goes on from the checkpoint it has saved."""

    reason: Reason
    step: int
    """Optimiser steps done."""


class Finding(NamedTuple):
    """What was met once or more."""

    reason: str
    times: int
    first: str
    """The first it was met at."""


def count_reasons(cases: Iterable[tuple[str, str]]) -> list[Finding]:
    """The findings of (name, reason) pairs, one for each reason, in alphabetical order."""
    return unite_findings(Finding(reason, 1, name) for name, reason in cases)


def unite_findings(findings: Iterable[Finding]) -> list[Finding]:
    """The findings of several tasks, one for each reason, in alphabetical order; the first one's example stays."""
    united: dict[str, Finding] = {}
    for finding in findings:
        known = united.get(finding.reason)
        united[finding.reason] = (
            finding if known is None else known._replace(times=known.times + finding.times)
        )
    return [united[reason] for reason in sorted(united)]
