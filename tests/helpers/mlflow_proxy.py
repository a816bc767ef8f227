"""An HTTP proxy in front of an MLflow server, which applies a test's fault to every request.

with mlflow_proxy(server.uri) as proxy:
    proxy.mode = "error"
"""

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit


class MlflowProxy:
    """The proxy as a test controls it."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.uri = ""
        """Address of the proxy."""
        self.mode: Literal["pass", "hold", "error", "lose", "down"] = "pass"
        """`hold` waits for `go_on`, `error` answers 500, `lose` forwards the request but drops the
        answer, `down` hangs up."""
        self.go_on = threading.Event()
        self.requests: list[str] = []
        """The mode at the time of each request."""


@contextlib.contextmanager
def mlflow_proxy(upstream: str) -> Iterator[MlflowProxy]:
    """Runs a proxy in threads until the block ends."""
    proxy = MlflowProxy(upstream)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    proxy.uri = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy
    finally:
        proxy.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: MlflowProxy

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        mode = self.proxy.mode
        self.proxy.requests.append(mode)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.close_connection = True
        if mode == "hold":
            self.proxy.go_on.wait(60)
        if mode == "error":
            self._answer(
                500,
                "application/json",
                b'{"error_code": "INTERNAL_ERROR", "message": "out of memory"}',
            )
        elif mode != "down":
            answer = self._ask(body)
            if mode != "lose":
                self._answer(*answer)

    do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

    def _ask(self, body: bytes) -> tuple[int, str, bytes]:
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        with contextlib.closing(upstream):
            upstream.request(
                self.command, self.path, body or None, {"Content-Type": "application/json"}
            )
            answer = upstream.getresponse()
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # the client had enough
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
