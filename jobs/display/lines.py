"""Prints everything that is written or logged above a live display, line by line."""

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

# Trainings log their progress. The display shows the same, and these lines would push all others
# out of the terminal.
_SHOWN_BELOW = re.compile(
    r"(\([^)]*pid=\d+[^)]*\) )?"  # Ray's prefix of a worker's line
    r"(pretrain step \d+/\d+  epoch \d+  |transfer \S+ \S+/seed_\d+ step \d+/\d+)"
)


@contextmanager
def lines_above(console: Console) -> Iterator[None]:
    """Shows what the block prints or logs above the display of the console, in whole lines.

    rich has a redirection of its own, which is not used: it misses logging handlers, which hold the
    stream they were made with, and it mixes the unfinished lines of threads
    (`test_lines_above_are_whole_and_in_order`).
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
    """Stand-in for stdout or stderr; passes everything but writing on to the stream itself."""

    def __init__(self, stream: TextIO, console: Console) -> None:
        self._stream, self._console = stream, console
        self._lock = threading.Lock()
        self._unfinished: dict[int, str] = {}
        """The unfinished line of each thread, by its id: print() writes text and newline apart."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Prints the lines that are complete, and keeps the rest for the thread's next write."""
        thread = threading.get_ident()
        with self._lock:
            *lines, rest = (self._unfinished.pop(thread, "") + text).split("\n")
            if rest:
                self._unfinished[thread] = rest
        self._print(lines)
        return len(text)

    def flush(self) -> None:
        """Does nothing: complete lines are printed at once, unfinished ones wait for their end."""

    def print_rest(self) -> None:
        """Prints the lines that are still unfinished at the end."""
        self._print(list(self._unfinished.values()))

    def _print(self, lines: list[str]) -> None:
        texts = [self._decoded(line) for line in lines if not _SHOWN_BELOW.match(line)]
        if texts:
            # soft_wrap: the terminal folds a long line, so that it can be copied as one
            self._console.print(Text("\n").join(texts), soft_wrap=True)

    def _decoded(self, line: str) -> Text:
        """Keeps the colours of a line and drops codes that would move the cursor."""
        encoding = self._console.encoding
        printable = line.rstrip("\r").encode(encoding, "backslashreplace").decode(encoding)
        return AnsiDecoder().decode_line(printable)


def _move_handlers(before: Any, after: Any) -> None:
    """Points all logging handlers that write to one stream to another."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        if not isinstance(logger, logging.Logger):
            continue  # a PlaceHolder, which has no handlers
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(after)
