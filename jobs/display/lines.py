"""How whatever is printed or logged gets above a live display, whole, and how the display does not flicker."""

import io
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.text import Text

# what rank 0 of a pretraining says at each record: the display says it better, and it would push all else away
_SHOWN = re.compile(r"(\([^)]*pid=\d+[^)]*\) )?pretrain step \d+/\d+  epoch \d+  ")


class Frames:
    """A terminal that shows each write when it is whole: without, the display is seen empty at times.

    Terminals that do not know these modes (synchronised output) ignore them.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """All of it at once."""
        return self._stream.write(f"\x1b[?2026h{text}\x1b[?2026l")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lines_above(console: Console) -> Iterator[None]:
    """Has whatever is printed or logged in the block appear above the display, whole."""

    def show(lines: list[str]) -> None:
        wanted = [line for line in lines if not _SHOWN.match(line)]
        if wanted:  # unwrapped: the terminal folds a long line, and it is copied as one
            console.print(Text("\n").join(map(decoded, wanted)), soft_wrap=True)

    def decoded(line: str) -> Text:
        known = line.rstrip("\r").encode(console.encoding, "backslashreplace").decode(console.encoding)
        return AnsiDecoder().decode_line(known)  # keeps colours; what would move the cursor is dropped

    out, err = _Lines(sys.stdout, show), _Lines(sys.stderr, show)
    with ExitStack() as stack:
        for stand_in, redirect in ((out, redirect_stdout), (err, redirect_stderr)):
            stream = stand_in._stream
            stack.callback(stand_in.end)
            stack.enter_context(redirect(cast(TextIO, stand_in)))
            stack.callback(_move_handlers, stand_in, stream)
            _move_handlers(stream, stand_in)
        yield


class _Lines(io.TextIOBase):
    """Stands for stdout or stderr: hands whole lines on, those of several threads unmixed.

    Args:
        stream: that it stands for; takes what comes when `show` does no longer.
        show: gets lines without their ends.
    """

    def __init__(self, stream: TextIO, show: Callable[[list[str]], None]) -> None:
        self._stream, self._show = stream, show
        self._begun: dict[int, str] = {}
        self._lock = threading.Lock()
        self._over = False

    def write(self, text: str) -> int:
        """Keeps what is no whole line yet."""
        if self._over:
            return self._stream.write(text)
        with self._lock:
            *lines, rest = (self._begun.pop(threading.get_ident(), "") + text).split("\n")
            if rest:
                self._begun[threading.get_ident()] = rest
        if lines:
            self._show(lines)
        return len(text)

    def flush(self) -> None:
        """Lines are shown at once; half a line has no place above the display."""
        if self._over:
            self._stream.flush()

    def end(self) -> None:
        """Shows what is left; from now on the stream itself takes all, for handlers may keep this object."""
        self._over = True
        if self._begun:
            self._show(list(self._begun.values()))

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Of the stream."""
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return self._stream.encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _move_handlers(before: Any, after: Any) -> None:
    """A logging handler holds the stream that it was made with."""
    loggers = [logging.getLogger(), *list(logging.Logger.manager.loggerDict.values())]
    for handler in {handler for each in loggers if isinstance(each, logging.Logger) for handler in each.handlers}:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)
