"""Request to stop a pretraining for good: a file in its folder that names who requested it.

The file is in storage, which the processes can reach wherever they run. It outlives the process
that wrote it, so a pretraining that is started again also stops.
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
    """A pretraining stopped before its last epoch because of a request."""


def request_stop(url: str, by: str) -> None:
    """Requests that a pretraining stops; it does so within seconds.

    Args:
        url: URL of the pretraining's folder.
        by: origin of the request for the error message, e.g. "the sweep".
    """
    write_bytes(join_url(url, _FILE), by.encode())


class StopRequest:
    """The stop request of a pretraining, as seen by one of its processes.

    Args:
        url: URL of the pretraining's folder.
    """

    def __init__(self, url: str) -> None:
        self.url = join_url(url, _FILE)
        self.seen = threading.Event()

    def error(self, epoch: int) -> StoppedError:
        """Returns the error with which the training stops after an epoch."""
        by = read_bytes(self.url).decode()
        return StoppedError(
            f"stopped by {by} at epoch {epoch}; remove the file {self.url} to let it continue"
        )


@contextmanager
def watched_request(url: str) -> Iterator[StopRequest]:
    """Watches for the stop request of a pretraining until the block ends.

    Rank 0 looks in a thread, so that no step waits for storage. Other ranks learn of the request
    through `TrainingProcess.interruption`.

    Args:
        url: URL of the pretraining's folder.
    """
    request, done = StopRequest(url), threading.Event()
    if rank() == 0:
        thread = threading.Thread(
            target=_look, args=(request, done), name="hemoco-stop-request", daemon=True
        )
        thread.start()
    try:
        yield request
    finally:
        done.set()


def _look(request: StopRequest, done: threading.Event) -> None:
    while not done.is_set() and not request.seen.is_set():
        try:
            if exists(request.url):
                request.seen.set()
        except StorageError as error:  # if it lasts, the training fails by itself
            logger.warning("event=stop_request_unknown reason=%s", error)
        done.wait(_LOOK_S)
