"""One HTTP GET of a byte range, with the standard library.

Bytes go from the socket straight into the caller's memory, without a copy. What arrived before a
fault is kept.
"""

import contextlib
import http.client
import os
import re
import select
from collections import deque
from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit

from hemoco.storage.objects import tls_context

_CONNECT_S = 5.0
_ERROR_BYTES = 4096
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
# Idle connections by process, scheme and host. By process, because a forked child must not use the
# connections of its parent (test_a_forked_child_fetches_after_its_parent_did).
_idle: dict[tuple[int, str, str], deque[http.client.HTTPConnection]] = {}


class RangeAnswer:
    """The head of an HTTP answer, and the part of its body that is not yet read.

    Attributes:
        status: HTTP status.
        ranged: whether the body is a range of the object; otherwise it is the whole object.
        first: position in the object of the first byte of the body.
        left: bytes of the body that are still to come; None if the server does not say.
        size: bytes of the whole object; None if the server does not say.
    """

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        self.status = response.status
        self.first = 0
        self.left: int | None = response.length
        self.size: int | None = response.length
        header = response.headers.get("Content-Range")
        # the header counts and not status 206: rclone sends ranges with status 200
        self.ranged = header is not None
        if header is None:
            return
        parsed = _CONTENT_RANGE.fullmatch(header)
        if parsed is None or self.left != int(parsed[2]) + 1 - int(parsed[1]):
            self.left = self.size = None
        else:
            self.first = int(parsed[1])
            self.size = None if parsed[3] == "*" else int(parsed[3])

    def read_into(self, view: memoryview) -> int:
        """Receives the bytes that have arrived, at least one; 0 means that the body has ended."""
        assert self.left is not None
        # Reads from the socket's buffer: HTTPResponse.readinto loses what came before a fault.
        count = self._response.fp.readinto1(view[: self.left])
        self.left -= count
        return count

    def reason(self) -> str:
        """Status and reason of an error; reads the body, in which S3 names the reason."""
        code = re.search(rb"<Code>(\w+)</Code>", self._response.read(_ERROR_BYTES))
        return f"{self.status} {code[1].decode() if code else self._response.reason}"


@contextlib.contextmanager
def get_range(url: str, start: int, stop: int, *, silence_s: float) -> Iterator[RangeAnswer]:
    """Requests the bytes [start, stop) of the object at an http(s) URL.

    Args:
        url: may be signed, so no error contains it.
        start: first byte.
        stop: byte after the last.
        silence_s: longest time without a byte.

    Raises:
        OSError: the connection fails or stalls, here or inside the block.
        http.client.HTTPException: the answer is not HTTP.
    """
    parts = urlsplit(url)
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with _connection(parts, silence_s) as connection:
        connection.request("GET", f"{parts.path or '/'}?{parts.query}", headers=headers)
        with connection.getresponse() as response:
            answer = RangeAnswer(response)
            yield answer
            if answer.left != 0:  # the rest would be taken for the next answer
                connection.close()


@contextlib.contextmanager
def _connection(parts: SplitResult, silence_s: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to a host, kept for the next request unless the block raises or closes it."""
    idle = _idle.setdefault((os.getpid(), parts.scheme, parts.netloc), deque())
    connection = _take_alive(idle) or _connect(parts, min(_CONNECT_S, silence_s))
    try:
        connection.sock.settimeout(silence_s)
        yield connection
    except BaseException:
        connection.close()
        raise
    if connection.sock is not None:
        idle.append(connection)


def _take_alive(idle: "deque[http.client.HTTPConnection]") -> http.client.HTTPConnection | None:
    """An idle connection that the server has not closed; None if there is none."""
    while True:
        try:
            connection = idle.pop()
        except IndexError:  # none there: looking first would race with the other threads
            return None
        # An idle connection has nothing to read, unless the server has closed it.
        events = select.poll()
        events.register(connection.sock, select.POLLIN)
        if not events.poll(0):
            return connection
        connection.close()


def _connect(parts: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    host, port = parts.hostname or "", parts.port
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            host, port, timeout=timeout_s, context=tls_context()
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    connection.connect()
    return connection
