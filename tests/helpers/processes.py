"""Search for processes and ports of this machine."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def alive(text: str) -> list[int]:
    """Returns processes with `text` in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes()
        except OSError:
            continue
        if text.encode() in words and int(file.parent.name) != os.getpid():
            found.append(int(file.parent.name))
    return found


@contextmanager
def busy_port() -> Iterator[int]:
    """A port of this machine that a process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
