"""A TCP relay on loopback that cuts connections on command, in front of a server of the tests."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit


class Relay(socketserver.ThreadingTCPServer):
    """Relay that forwards bytes in both directions.

    Args:
        upstream: URL of the server behind it.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname, parts.port)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        """URL of the relay."""
        self.cuts: list[tuple[bytes, int]] = []
        """Connections to cut, as (bytes that the request contains, bytes of the answer to send)."""
        self.lost_after_cut = False
        """True if the first cut ends all connections, including new ones."""
        self.closed = threading.Event()


class _Connection(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        if self.server.closed.is_set():
            return
        with socket.create_connection(self.server.upstream) as upstream:
            request = self.request.recv(65536)
            upstream.sendall(request)
            limit = next((cut for cut in self.server.cuts if cut[0] in request), None)
            if limit:
                self.server.cuts.remove(limit)
            threading.Thread(target=self._forward, args=(upstream,), daemon=True).start()
            self._back(upstream, limit[1] if limit else None)

    def _forward(self, upstream: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(65536):
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_WR)

    def _back(self, upstream: socket.socket, left: int | None) -> None:
        upstream.settimeout(0.1)
        with contextlib.suppress(OSError):
            while not self.server.closed.is_set():
                try:
                    data = upstream.recv(4096)
                except TimeoutError:
                    continue
                self.request.sendall(data if left is None else data[:left])
                left = None if left is None else left - len(data)
                if left is not None and left <= 0:
                    if self.server.lost_after_cut:
                        self.server.closed.set()
                        self.server.socket.close()
                    return
                if not data:
                    return


@contextlib.contextmanager
def relay(upstream: str) -> Iterator[Relay]:
    """A running relay."""
    with Relay(upstream) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.closed.set()
        server.shutdown()
