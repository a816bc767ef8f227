"""The live display of a run or sweep where output is a terminal: MLflow's records, with all other lines above.

It reads MLflow in a thread of its own and nothing else, so it shows alike what runs here and what runs on a cluster. It
never raises into the run, and never makes it wait for MLflow.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from hemoco.config import Recipe, TransferConfig
from hemoco.data.shards.index import ShardIndexes
from hemoco.errors import HemocoError, first_line
from hemoco.tracking.client import connect, tracking_uri
from jobs.display.lines import lines_above
from jobs.display.rows import GAP, WARNING, clock, one_line
from jobs.display.run_view import Plan, RunView
from jobs.display.sweep_view import SweepView

logger = logging.getLogger(__name__)

_POLL_S = 2.0
_BUSY = (
    4  # an MLflow that takes long is asked less often: it is left alone for so many times as long
)
_LAST_LOOK_S = 1.0
_REFRESH_PER_S = 2
_SILENT_S = 10.0  # MLflow answers within a second; above this something is wrong
_THREAD = "hemoco-live"


class View(Protocol):
    """The part of the display that shows MLflow's records."""

    def look(self, uri: str, experiment_id: str) -> None:
        """Reads MLflow once; called in the display's thread.

        Raises:
            TrackingError: it does not answer.
        """

    def __rich__(self) -> RenderableType: ...


@contextmanager
def live_display(
    run: str,
    *,
    pretrain: Recipe | None,
    transfers: Mapping[str, TransferConfig],
    indexes: ShardIndexes,
) -> Iterator[None]:
    """Shows how far a run is while the block works at it.

    Args:
        run: its name.
        pretrain: the recipe of its pretraining; None: its backbone is given.
        transfers: the transfers that it measures, by name.
        indexes: of this command.
    """

    def view() -> RunView:
        plan = Plan(
            run=run,
            began_s=time.time(),
            pretrain=pretrain.pretrain if pretrain else None,
            steps_per_epoch=_steps_per_epoch(pretrain, indexes) if pretrain else None,
            transfers=transfers,
        )
        return RunView(plan)

    with _displayed(run, view):
        yield


@contextmanager
def live_sweep(sweep: str, recipe: Recipe) -> Iterator[None]:
    """Shows how far a sweep is while the block works at it.

    Args:
        sweep: its name.
        recipe: with a `sweep`.
    """
    assert recipe.sweep is not None, "the caller has checked it"
    config, epochs = recipe.sweep, recipe.pretrain.epochs
    with _displayed(sweep, lambda: SweepView(sweep, config, epochs)):
        yield


@contextmanager
def _displayed(name: str, make_view: Callable[[], View]) -> Iterator[None]:
    """Shows a view while the block works; where output is no terminal it does nothing, and makes none.

    MLflow must have been connected to before: two threads must not import it at the same time.
    """
    console = terminal()
    if console is None:
        yield
        return
    watcher = _Watcher(name, make_view(), tracking_uri())
    live = Live(
        watcher,
        console=console,
        refresh_per_second=_REFRESH_PER_S,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with ExitStack() as stack:
        stack.callback(_stop, live)
        live.start(refresh=True)
        stack.enter_context(lines_above(console))
        stack.callback(watcher.end)
        watcher.begin()
        yield


def terminal() -> Console | None:
    """The terminal to draw on; None where plain lines are right: output goes elsewhere, or the terminal is dumb.

    Both streams must be terminals: one that goes through a pipe, as to `tee`, mostly ends on the same terminal.
    """
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return None
    console = Console(file=sys.stdout)
    return (
        console
        if console.is_terminal and console.is_interactive and not console.is_dumb_terminal
        else None
    )


class _Watcher:
    """Reads MLflow every few seconds in a daemon thread: one that waits for an answer must not hold up the run."""

    def __init__(self, name: str, view: View, uri: str) -> None:
        self._name, self._view, self._uri = name, view, uri
        self._experiment_id, self._problem = "", ""
        self._began_s = self._answered_s = time.time()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=_THREAD, daemon=True)

    def begin(self) -> None:
        """Starts reading."""
        logging.getLogger("urllib3.connectionpool").addFilter(_is_of_other_threads)
        self._thread.start()

    def end(self) -> None:
        """Reads a last time, if MLflow answers at once."""
        self._ending.set()
        self._thread.join(_LAST_LOOK_S)

    def __rich__(self) -> RenderableType:
        now_s = time.time()
        return Group(
            Text(),
            self._view,
            footer(self._name, now_s - self._began_s, now_s - self._answered_s, self._problem),
        )

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._ending.is_set()  # before reading: the records of the run's end are seen
            began_s = time.monotonic()
            try:
                self._experiment_id = self._experiment_id or connect(self._uri)
                self._view.look(self._uri, self._experiment_id)
                self._answered_s, self._problem = time.time(), ""
            except Exception as error:  # of any kind: it must not touch the run, and is shown
                self._problem = first_line(error)
                logger.debug("event=no_answer", exc_info=True)
            self._ending.wait(max(_POLL_S, _BUSY * (time.monotonic() - began_s)))


def footer(name: str, elapsed_s: float, silence_s: float, problem: str) -> Text:
    """The time since the start and the name; instead of the name that MLflow does not answer, and why."""
    elapsed = f"elapsed {clock(elapsed_s)}{GAP}"
    if silence_s <= _SILENT_S:
        return one_line(Text.assemble(elapsed, (name, "dim")))
    return one_line(
        Text.assemble(
            elapsed, (f"MLflow does not answer, {clock(silence_s)}{GAP}", WARNING), problem
        )
    )


def _is_of_other_threads(record: logging.LogRecord) -> bool:
    """Drops warnings of the HTTP client from the display's thread: it shows already that MLflow does not answer."""
    return record.threadName != _THREAD


def _stop(live: Live) -> None:
    with suppress(OSError):  # the terminal is gone: there is nothing to restore
        live.stop()


def _steps_per_epoch(recipe: Recipe, indexes: ShardIndexes) -> int | None:
    from hemoco.data.stream.batches import (  # torch takes seconds to import, errors should not
        pretraining_plan,
        steps_per_epoch,
    )

    try:
        index = indexes.at(recipe.data.shards)
        return steps_per_epoch(index, recipe.data.pretrain_split, pretraining_plan(recipe.pretrain))
    except HemocoError as error:  # the run raises it too, with advice
        logger.debug("event=length_unknown %s", error)
        return None
