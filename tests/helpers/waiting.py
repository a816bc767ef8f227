"""Waiting for other threads and processes."""

import time
from collections.abc import Callable

_POLL_S = 0.1


def within(seconds: float, holds: Callable[[], object]) -> bool:
    """Returns whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return bool(held)


def wait_until(holds: Callable[[], object], seconds: float) -> None:
    """Fails unless a condition becomes true in time."""
    assert within(seconds, holds), f"not true within {seconds} s"
