"""Retries: which errors are transient, how long to wait, and when to give up.

All retries of hemoco use this module. A caller states its settings as a `RetryPolicy`; tenacity
runs the loop.
"""

import http.client
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
)
from tenacity.stop import stop_base

from hemoco.errors import StorageError

Answer = TypeVar("Answer")

EVALUATION_PATIENCE_S = 600.0
"""Seconds for which reads of labelled splits are retried; for a training see `stream.retry_s`."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Conditions and waits of retries."""

    is_transient: Callable[[BaseException], bool]
    """True for errors after which another attempt may succeed; others are raised at once."""
    first_wait_s: float = 0.1
    """Longest wait after the first of several faults in a row; it doubles with each further one."""
    longest_wait_s: float = 20.0
    """Bound to which the longest wait grows."""
    budget_s: float = math.inf
    """Seconds without progress after which the last error is raised."""
    max_attempts: int | None = None
    """Attempts after which the last error is raised; None for no such bound."""

    def wait_s(self, faults: int, draw: float) -> float:
        """Seconds to wait before the next attempt: exponential backoff with full jitter.

        Full jitter spreads the retries of the many processes that one outage has met.

        Args:
            faults: faults in a row, at least 1.
            draw: uniform in [0, 1).
        """
        return draw * min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(faults - 1, 30))


def retrying(
    policy: RetryPolicy,
    *,
    progress: Callable[[], int] = lambda: 0,
    on_fault: Callable[[BaseException], None] = lambda fault: None,
) -> Retrying:
    """Attempts under a policy: call it with a function, or loop over it as with tenacity.

    When the policy gives up, the last error is raised.

    Args:
        policy: when to retry, and after what wait.
        progress: returns how much is done. A fault after progress restarts the budget and the
            waits.
        on_fault: called with each transient error.
    """
    done = progress()

    def note_fault(state: RetryCallState) -> None:
        nonlocal done
        assert state.outcome is not None and state.outcome_timestamp is not None
        fault = state.outcome.exception()
        assert fault is not None
        on_fault(fault)
        if progress() > done:
            done = progress()
            state.attempt_number, state.start_time = 1, state.outcome_timestamp

    def wait_s(state: RetryCallState) -> float:
        # the last attempt starts no later than the end of the budget
        left_s = policy.budget_s - (state.seconds_since_start or 0.0)
        return max(0.0, min(policy.wait_s(state.attempt_number, random.random()), left_s))

    stop: stop_base = stop_after_delay(policy.budget_s)
    if policy.max_attempts is not None:
        stop = stop | stop_after_attempt(policy.max_attempts)
    return Retrying(
        retry=retry_if_exception(policy.is_transient),
        after=note_fault,
        wait=wait_s,
        stop=stop,
        sleep=time.sleep,
        reraise=True,  # the last error itself instead of tenacity's RetryError
    )


def patiently(call: Callable[[], Answer], budget_s: float) -> Answer:
    """Calls a function that uses the storage, and retries it after transient faults.

    Raises:
        StorageError: the error of the last call within `budget_s`, or the first that is not
            transient.
    """
    return retrying(replace(STORAGE_RETRIES, budget_s=budget_s))(call)


BUSY = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
"""HTTP statuses below 500 that are transient."""

_PERMANENT = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
)


def is_transient(error: BaseException) -> bool:
    """True for an error of the network or the server, after which another attempt may succeed."""
    if isinstance(error, StorageError):
        return error.__cause__ is not None and is_transient(error.__cause__)
    status = http_status(error)
    if status is not None:
        return status >= http.HTTPStatus.INTERNAL_SERVER_ERROR or status in BUSY
    network = loaded_classes(
        "botocore.exceptions:HTTPClientError",
        "botocore.exceptions:EndpointConnectionError",
        "aiohttp:ClientError",
        "azure.core.exceptions:ServiceRequestError",
        "azure.core.exceptions:ServiceResponseError",
        "google.auth.exceptions:TransportError",
    )
    # botocore's error of an untrusted certificate is an OSError
    certificate = loaded_classes("botocore.exceptions:SSLError")
    permanent: tuple[type[Exception], ...] = (*_PERMANENT, *certificate)
    if isinstance(error, permanent):
        return False
    return isinstance(error, (OSError, http.client.HTTPException, *network))


def http_status(error: BaseException) -> int | None:
    """The HTTP status of an error of fsspec's packages, if it has one."""
    for carrier in (error, error.__cause__):  # s3fs raises its own errors from botocore's
        response = getattr(carrier, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    for name in ("status", "status_code", "code"):  # aiohttp; azure; gcsfs
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status
    return None


def loaded_classes(*names: str) -> Iterator[type[Exception]]:
    """The classes `module:name` whose module is imported.

    A module that is not imported has raised nothing, and is perhaps not installed.
    """
    for full_name in names:
        module_name, _, name = full_name.partition(":")
        module = sys.modules.get(module_name)
        if module:
            yield getattr(module, name)


STORAGE_RETRIES = RetryPolicy(is_transient=is_transient)
"""Retries of reading and writing objects; the caller sets the budget."""
