"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable

_POLL_S = 0.1


def within(seconds: float, holds: Callable[[], object]) -> bool:
    """Whether something comes to hold in time."""
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return bool(held)


def wait_until(holds: Callable[[], object], seconds: float) -> None:
    """Fails unless something comes to hold in time."""
    assert within(seconds, holds), "it did not come to pass"
