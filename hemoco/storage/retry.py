"""The one policy for trying again: which errors are transient, how long to wait, when to give up.

Every caller names its settings as a `RetryPolicy`. The loop itself is tenacity's.
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

from hemoco.errors import StorageError

Answer = TypeVar("Answer")

EVALUATION_PATIENCE_S = 600.0
"""For which reading labelled splits waits out faults; a training's stream has a setting of its own."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When an attempt is repeated, and after what wait."""

    is_transient: Callable[[BaseException], bool]
    """Whether another attempt may succeed; any other error is raised at once."""
    first_wait_s: float = 0.1
    """Longest wait after the first fault in a row; it doubles with each further one."""
    longest_wait_s: float = 20.0
    """What the longest wait grows to."""
    budget_s: float = math.inf
    """Seconds without progress after which the last error is raised."""
    max_attempts: int | None = None
    """Attempts after which the last error is raised; None where time alone counts."""

    def wait_s(self, faults: int, draw: float) -> float:
        """Seconds to wait after so many faults in a row: exponential, with full jitter.

        Full jitter keeps the many processes that one outage has met from coming back all at once.

        Args:
            faults: at least 1.
            draw: uniform in [0, 1).
        """
        return draw * min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(faults - 1, 30))


def retrying(
    policy: RetryPolicy,
    *,
    progress: Callable[[], int] = lambda: 0,
    on_fault: Callable[[BaseException], None] = lambda fault: None,
) -> Retrying:
    """Attempts under a policy, to call a function with or to loop over; at the end the last error is raised.

    Args:
        policy: of the attempts.
        progress: how much is done; a fault after more was done begins the budget and the waits anew.
        on_fault: gets each transient error.
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
        # the last attempt begins when the budget ends, not a wait later
        left_s = policy.budget_s - (state.seconds_since_start or 0.0)
        return max(0.0, min(policy.wait_s(state.attempt_number, random.random()), left_s))

    spent = stop_after_delay(policy.budget_s)
    return Retrying(
        retry=retry_if_exception(policy.is_transient),
        after=note_fault,
        wait=wait_s,
        stop=spent
        if policy.max_attempts is None
        else spent | stop_after_attempt(policy.max_attempts),
        sleep=time.sleep,
        reraise=True,
    )


def patiently(call: Callable[[], Answer], budget_s: float) -> Answer:
    """Calls a function of the storage, again after transient faults until it returns or `budget_s` has passed.

    Raises:
        StorageError: as the last call raised it, or the first that another attempt cannot help.
    """
    return retrying(replace(STORAGE_RETRIES, budget_s=budget_s))(call)


BUSY = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
"""HTTP statuses below 500 that pass."""


_PERMANENT = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
)


def is_transient(error: BaseException) -> bool:
    """Whether the network or the server is at fault and not the request, so that another attempt may succeed."""
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
    # the certificate's is an OSError, too
    permanent: tuple[type[Exception], ...] = (
        *_PERMANENT,
        *loaded_classes("botocore.exceptions:SSLError"),
    )
    return isinstance(error, (OSError, http.client.HTTPException, *network)) and not isinstance(
        error, permanent
    )


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of fsspec's packages carries, if any."""
    for carrier in (error, error.__cause__):  # s3fs gives botocore's as the cause
        if isinstance(response := getattr(carrier, "response", None), dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    # aiohttp; azure; gcsfs
    found = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    return next((status for status in found if isinstance(status, int)), None)


def loaded_classes(*names: str) -> Iterator[type[Exception]]:
    """Those of the classes `module:name` that something has imported: local files need no client installed."""
    for module, _, name in (path.partition(":") for path in names):
        if found := sys.modules.get(module):
            yield getattr(found, name)


STORAGE_RETRIES = RetryPolicy(is_transient=is_transient)
"""Of reading and writing objects; the budget is the caller's."""
