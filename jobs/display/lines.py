"""Prints whatever is written or logged above a live display, line by line."""

import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.text import Text

# trainings log their progress; the display shows the same, and these lines would push all else away
_SHOWN_BELOW = re.compile(
    r"(\([^)]*pid=\d+[^)]*\) )?(pretrain step \d+/\d+  epoch \d+  |transfer \S+ \S+/seed_\d+ step \d+/\d+)"
)


@contextmanager
def lines_above(console: Console) -> Iterator[None]:
    """Makes whole lines of what the block prints or logs appear above the display of the console.

    rich's own redirection is not used: it takes no logging handlers along, and mixes the half lines of threads.
    """
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            lines = _Lines(stream, console)
            stack.callback(lines.print_rest)
            stack.enter_context(redirect(cast(TextIO, lines)))
            stack.callback(_move_handlers, lines, stream)
            _move_handlers(stream, lines)
        yield


class _Lines:
    """Stands for stdout or stderr while there is a display; all but writing goes to the stream itself."""

    def __init__(self, stream: TextIO, console: Console) -> None:
        self._stream, self._console = stream, console
        self._lock = threading.Lock()
        self._rest: dict[int, str] = {}
        """The half line of each thread."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Prints the whole lines, and keeps what is no whole line yet."""
        with self._lock:
            *lines, rest = (self._rest.pop(threading.get_ident(), "") + text).split("\n")
            if rest:
                self._rest[threading.get_ident()] = rest
        self._print(lines)
        return len(text)

    def flush(self) -> None:
        """Does nothing: whole lines are printed at once, and half a line has no place above the display."""

    def print_rest(self) -> None:
        """Prints the half lines that are left at the end."""
        self._print(list(self._rest.values()))

    def _print(self, lines: list[str]) -> None:
        encoding = self._console.encoding
        texts = [
            # keeps colours, and drops what would move the cursor
            AnsiDecoder().decode_line(
                line.rstrip("\r").encode(encoding, "backslashreplace").decode(encoding)
            )
            for line in lines
            if not _SHOWN_BELOW.match(line)
        ]
        if texts:  # unwrapped: the terminal folds a long line, and it is copied as one
            self._console.print(Text("\n").join(texts), soft_wrap=True)


def _move_handlers(before: Any, after: Any) -> None:
    """Moves logging handlers, which hold the stream that they were made with."""
    for logger in [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]:
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(after)
