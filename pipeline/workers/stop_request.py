"""A pretraining that is asked to end for good: a file in its folder says by whom.

In storage, which its processes reach wherever they run, and where the request outlives whoever made it: the training
ends also when it is begun again.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hemoco.distributed import rank
from hemoco.errors import StorageError, TrainingError
from hemoco.storage.objects import exists, join_url, read_bytes, write_bytes

logger = logging.getLogger(__name__)

_FILE = "stop"
_LOOK_S = 5.0


class StoppedError(TrainingError):
    """A pretraining ended before its last epoch because it was asked to."""


def request_stop(url: str, by: str) -> None:
    """Asks the pretraining below a URL to end, within seconds.

    Args:
        url: folder of the pretraining.
        by: who asks, for its error: "the sweep".
    """
    write_bytes(join_url(url, _FILE), by.encode())


class StopRequest:
    """Whether a pretraining is to end, as one of its processes knows it."""

    def __init__(self, url: str) -> None:
        self.url = join_url(url, _FILE)
        self.seen = threading.Event()

    def error(self, epoch: int) -> StoppedError:
        """What a training ends by that obeys it after so many epochs."""
        by = read_bytes(self.url).decode()
        return StoppedError(
            f"stopped by {by} at epoch {epoch}; without the file {self.url} it would go on"
        )


@contextmanager
def watched_request(url: str) -> Iterator[StopRequest]:
    """A request for the pretraining below a URL; rank 0 looks for it in a thread, so that no step waits for storage."""
    request, done = StopRequest(url), threading.Event()
    if rank() == 0:
        threading.Thread(
            target=_look, args=(request, done), name="hemoco-stop-request", daemon=True
        ).start()
    try:
        yield request
    finally:
        done.set()


def _look(request: StopRequest, done: threading.Event) -> None:
    while not done.is_set() and not request.seen.is_set():
        try:
            if exists(request.url):
                request.seen.set()
        except StorageError as error:  # training itself finds out whether that is grave
            logger.warning("event=stop_request_unknown reason=%s", error)
        done.wait(_LOOK_S)
