"""How long to go on after faults of the network, and how long to wait between attempts."""

import http.client
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from hemoco.errors import StorageError

Answer = TypeVar("Answer")

EVALUATION_PATIENCE_S = 600.0
"""For which reading labelled splits waits out faults; a training's stream has a setting of its own."""
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 20.0
_LAST_CHANCE_S = 1.0


def backoff_s(faults: int, draw: float) -> float:
    """Seconds to wait after so many faults in a row: full jitter, exponential from 0.1 to 20 s.

    Args:
        faults: at least 1.
        draw: uniform in [0, 1).
    """
    return draw * min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(faults - 1, 30))


def patiently(ask: Callable[[], Answer], budget_s: float) -> Answer:
    """What `ask` returns, asked again after faults of the network until it was answered or `budget_s` has passed.

    Raises:
        StorageError: as `ask` raised it at last, or at once where asking again cannot help.
    """
    patience = Patience(budget_s)
    while True:
        try:
            return ask()
        except StorageError as error:
            if not isinstance(error.__cause__, Exception) or not is_transient(error.__cause__) or not patience.wait():
                raise


class Patience:
    """Waits after each fault, longer after each in a row, until there was no progress for `budget_s`.

    Args:
        budget_s: seconds without progress.
    """

    def __init__(self, budget_s: float) -> None:
        self.budget_s = budget_s
        self.faults = 0
        """All there were."""
        self.renew()

    @property
    def left_s(self) -> float:
        """Until it ends, but long enough for the last attempt to have a chance."""
        return max(self._deadline - time.monotonic(), _LAST_CHANCE_S)

    def renew(self) -> None:
        """Begins anew, after progress."""
        self._row = 0
        self._deadline = time.monotonic() + self.budget_s

    def wait(self) -> bool:
        """Waits after a fault; False instead when patience has ended."""
        self.faults += 1
        self._row += 1
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(backoff_s(self._row, random.random()), left_s))
        return True


BUSY = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
"""HTTP statuses below 500 that pass."""


_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)


def is_transient(error: Exception) -> bool:
    """Whether the network or the server is at fault and not the request, so that asking again may help."""
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
    permanent: tuple[type[Exception], ...] = (*_PERMANENT, *loaded_classes("botocore.exceptions:SSLError"))
    return isinstance(error, (OSError, http.client.HTTPException, *network)) and not isinstance(error, permanent)


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
