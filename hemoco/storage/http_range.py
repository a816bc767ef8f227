"""One HTTP GET of a byte range by the standard library: nothing is copied, and what came before a fault is kept."""

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
# idle connections by process, scheme and host: a forked child must not speak on its parent's
_idle: dict[tuple[int, str, str], deque[http.client.HTTPConnection]] = {}


class RangeAnswer:
    """The head of an answer, and its body as far as it was not read."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        self.status = response.status
        self.first = 0
        """Where in the object the body begins."""
        self.left: int | None = response.length
        """Bytes of the body that are still to come, None when the server does not say."""
        self.size: int | None = response.length
        """Of the whole object, None when the server does not say."""
        header = response.headers.get("Content-Range")
        self.ranged = header is not None  # rclone does it with status 200
        """Whether the body is a range of the object, else the whole."""
        if header is not None:
            self._take_range(header)

    def read_into(self, view: memoryview) -> int:
        """Receives what has come by now, at least a byte; 0 at the end of the stream."""
        assert self.left is not None
        # straight from the socket: HTTPResponse's own way loses what came before a fault
        count = self._response.fp.readinto1(view[: self.left])
        self.left -= count
        return count

    def reason(self) -> str:
        """Status and what S3 or the server calls it; reads the body of an error."""
        found = re.search(rb"<Code>(\w+)</Code>", self._response.read(_ERROR_BYTES))
        return f"{self.status} {found[1].decode() if found else self._response.reason}"

    def _take_range(self, header: str) -> None:
        found = _CONTENT_RANGE.fullmatch(header)
        if found is None or self.left != int(found[2]) + 1 - int(found[1]):
            self.left = self.size = None
        else:
            self.first = int(found[1])
            self.size = None if found[3] == "*" else int(found[3])


@contextlib.contextmanager
def get_range(url: str, start: int, stop: int, *, silence_s: float) -> Iterator[RangeAnswer]:
    """Asks for the bytes [start, stop) of the object at an http(s) URL.

    Args:
        url: held secret, also by the errors: it may be signed.
        start: first byte.
        stop: byte after the last.
        silence_s: longest time without a byte.

    Raises:
        OSError: the connection fails or stalls, also inside the block.
        http.client.HTTPException: the answer is no HTTP.
    """
    parts = urlsplit(url)
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with _connection(parts, silence_s) as connection:
        connection.request("GET", f"{parts.path or '/'}?{parts.query}", headers=headers)
        with connection.getresponse() as response:
            answer = RangeAnswer(response)
            yield answer
            if answer.left != 0:  # must not be taken for the next answer
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
    """An idle connection that the server has not closed."""
    with contextlib.suppress(IndexError):  # none left: other threads take some too
        while connection := idle.pop():
            events = select.poll()
            events.register(connection.sock, select.POLLIN)
            if not events.poll(0):
                return connection
            connection.close()
    return None


def _connect(parts: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    host, port = parts.hostname or "", parts.port
    connection = (
        http.client.HTTPSConnection(host, port, timeout=timeout_s, context=tls_context())
        if parts.scheme == "https"
        else http.client.HTTPConnection(host, port, timeout=timeout_s)
    )
    connection.connect()
    return connection
