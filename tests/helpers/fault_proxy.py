"""An HTTP proxy with faults on command, in front of the S3 server of the tests.

Clients use the proxy's address as their endpoint. It forwards the Host header unchanged, since
signatures cover it.

    with fault_proxy(upstream_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.fail("status", times=3)
        ...
        assert [request.start for request in proxy.requests] == [0, 0, 0, 0]

Faults are used up in the order in which they were set; requests that match none are forwarded.
"""

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

Kind = Literal["status", "reset", "truncate", "stall", "trickle", "damage", "content_range"]


class Request(NamedTuple):
    """A request that the proxy received."""

    method: str
    path: str
    """Path without the query."""
    start: int | None
    """First byte of its range."""
    fault: Kind | None
    """The fault that the proxy applied, if any."""


@dataclass
class _Fault:
    kind: Kind
    times: float
    until: float
    after: int
    seconds: float
    status: int
    match: str


class FaultProxy:
    """The proxy as a test controls it.

    Args:
        upstream: the endpoint behind it.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        self.endpoint = ""
        """Address of the proxy."""
        self.requests: list[Request] = []
        """All requests in the order of their arrival."""
        self.sent_bytes: Counter[str] = Counter()
        """Bytes in the bodies of the server's answers, by path."""
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()

    def fail(
        self,
        kind: Kind,
        *,
        times: float = 1,
        for_s: float = float("inf"),
        after: int = 0,
        seconds: float = 0.0,
        status: int = 503,
        match: str = ".tar",
    ) -> None:
        """Applies a fault to the next GET requests.

        Args:
            kind: the fault. `status` answers with an HTTP status. `reset`, `truncate` and `stall`
                reset the connection, close it, or send nothing for some time, after some bytes of
                the body. `trickle` sends the body in small pieces with pauses. `damage` flips a
                bit of one byte. `content_range` announces a range that begins one byte later.
            times: number of requests.
            for_s: seconds for which the fault is active.
            after: bytes of the body before the fault, or between the pauses of `trickle`.
            seconds: duration of `stall`, or of each pause of `trickle`.
            status: the HTTP status of `status`.
            match: part of the path of the requests.
        """
        self._faults.append(
            _Fault(kind, times, time.monotonic() + for_s, after, seconds, status, match)
        )

    def heal(self) -> None:
        """Removes all faults."""
        self._faults.clear()

    def note_answer(self, path: str, length: int) -> None:
        """Counts the bytes of an answer's body."""
        with self._lock:
            self.sent_bytes[path] += length

    def take(self, method: str, path: str, start: int | None) -> _Fault | None:
        """Records a request and returns its fault, if any."""
        with self._lock:
            self._faults = [f for f in self._faults if f.times > 0 and time.monotonic() < f.until]
            fault = next((f for f in self._faults if method == "GET" and f.match in path), None)
            if fault is not None:
                fault.times -= 1
            self.requests.append(Request(method, path, start, fault.kind if fault else None))
            return fault


@contextlib.contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Runs a proxy in threads until the block ends."""
    proxy = FaultProxy(upstream)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        fault = self.proxy.take(
            self.command, urlsplit(self.path).path, int(found[1]) if found else None
        )
        try:
            if fault is not None and fault.kind == "status":
                self.send_response(fault.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._forward(fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client hung up

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forward(self, fault: _Fault | None) -> None:
        upstream = http.client.HTTPConnection(self.proxy.upstream.netloc, timeout=60)
        with contextlib.closing(upstream):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(self.rfile.read(int(self.headers.get("Content-Length", 0))) or None)
            answer = upstream.getresponse()
            body = b"" if self.command == "HEAD" else answer.read()
            self.proxy.note_answer(urlsplit(self.path).path, len(body))
            self._send_head(answer, len(body), fault)
            self._send_body(memoryview(body), fault)

    def _send_head(
        self, answer: http.client.HTTPResponse, length: int, fault: _Fault | None
    ) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if fault is not None and fault.kind == "content_range" and name == "Content-Range":
                value = re.sub(r"\d+(?=[-/])", lambda found: str(int(found[0]) + 1), value)
            if (
                name not in ("Transfer-Encoding", "Connection", "Content-Length")
                or self.command == "HEAD"
            ):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send_body(self, body: memoryview, fault: _Fault | None) -> None:
        if fault is None or fault.kind == "content_range":
            self.wfile.write(body)
        elif fault.kind == "damage":
            self.wfile.write(body[: fault.after])
            self.wfile.write(bytes([body[fault.after] ^ 1]))
            self.wfile.write(body[fault.after + 1 :])
        elif fault.kind == "trickle":
            for begin in range(0, len(body), fault.after):
                self.wfile.write(body[begin : begin + fault.after])
                time.sleep(fault.seconds)
        else:
            self.wfile.write(body[: fault.after])
            if fault.kind == "stall":
                time.sleep(fault.seconds)
                self.wfile.write(body[fault.after :])
            elif fault.kind == "reset":
                self._reset()
            self.close_connection = True

    def _reset(self) -> None:
        """Closes the connection with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())
