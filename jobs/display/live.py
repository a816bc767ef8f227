"""The live display of a run or sweep in a terminal: progress rows, with all other output above.

It reads MLflow and nothing else, so it shows runs on this machine and on a cluster alike. Reading
happens in a thread of its own: the display never raises into the run and never makes it wait.
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
_PAUSE_FACTOR = 4  # after a slow answer, MLflow is left alone for this many times as long
_LAST_READ_S = 1.0
_REFRESH_PER_S = 2
_SILENT_S = 10.0  # MLflow usually answers within a second
_THREAD = "hemoco-live"


class View(Protocol):
    """Rows of the display that show the records in MLflow."""

    def update(self, uri: str, experiment_id: str) -> None:
        """Reads MLflow once; called in the display's thread.

        Raises:
            TrackingError: MLflow does not answer.
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
    """Shows the progress of a run while the block works on it.

    Args:
        run: name of the run.
        pretrain: recipe of its pretraining; None if the backbone is given.
        transfers: transfers that it measures, by name.
        indexes: shard indexes that this command has read.
    """

    def make_view() -> RunView:
        plan = Plan(
            run=run,
            began_s=time.time(),
            pretrain=pretrain.pretrain if pretrain else None,
            steps_per_epoch=_steps_per_epoch(pretrain, indexes) if pretrain else None,
            transfers=transfers,
        )
        return RunView(plan)

    with _displayed(run, make_view):
        yield


@contextmanager
def live_sweep(sweep: str, recipe: Recipe) -> Iterator[None]:
    """Shows the progress of a sweep while the block works on it.

    Args:
        sweep: name of the sweep.
        recipe: its recipe, with a `sweep`.
    """
    assert recipe.sweep is not None, "the caller has checked it"
    config, epochs = recipe.sweep, recipe.pretrain.epochs
    with _displayed(sweep, lambda: SweepView(sweep, config, epochs)):
        yield


@contextmanager
def _displayed(name: str, make_view: Callable[[], View]) -> Iterator[None]:
    """Shows a view while the block works; does nothing if the output is not a terminal.

    The caller must have connected to MLflow before: two threads must not import it at the same
    time.
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
        # not `with live`: errors of its end are ignored, those of the block are not
        stack.callback(_stop, live)
        live.start(refresh=True)
        stack.enter_context(lines_above(console))
        stack.callback(watcher.end)
        watcher.begin()
        yield


def terminal() -> Console | None:
    """Returns the terminal to draw on; None if plain lines are to be printed.

    Both streams must be terminals: if one goes through a pipe, as to `tee`, it usually ends up on
    the same terminal and would tear the display.
    """
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return None
    console = Console(file=sys.stdout)
    if console.is_terminal and console.is_interactive and not console.is_dumb_terminal:
        return console
    return None


class _Watcher:
    """The whole display: the view, updated from MLflow every few seconds, and a footer.

    The thread is a daemon: a request that waits for an answer must not hold up the end of the run
    (`test_a_silent_mlflow_does_not_hold_the_end_back`).
    """

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
        self._thread.join(_LAST_READ_S)

    def __rich__(self) -> RenderableType:
        now_s = time.time()
        elapsed_s, silence_s = now_s - self._began_s, now_s - self._answered_s
        return Group(Text(), self._view, footer(self._name, elapsed_s, silence_s, self._problem))

    def _watch(self) -> None:
        is_last = False
        while not is_last:
            # before reading, so that the last read sees the records of the run's end
            is_last = self._ending.is_set()
            began_s = time.monotonic()
            try:
                self._experiment_id = self._experiment_id or connect(self._uri)
                self._view.update(self._uri, self._experiment_id)
                self._answered_s, self._problem = time.time(), ""
            except Exception as error:  # of any kind: it is shown, and must not reach the run
                self._problem = first_line(error)
                logger.debug("event=no_answer", exc_info=True)
            self._ending.wait(max(_POLL_S, _PAUSE_FACTOR * (time.monotonic() - began_s)))


def footer(name: str, elapsed_s: float, silence_s: float, problem: str) -> Text:
    """The time since the start and the run's name, or that MLflow does not answer and why."""
    elapsed = f"elapsed {clock(elapsed_s)}{GAP}"
    if silence_s <= _SILENT_S:
        return one_line(Text.assemble(elapsed, (name, "dim")))
    silence = f"MLflow does not answer, {clock(silence_s)}{GAP}"
    return one_line(Text.assemble(elapsed, (silence, WARNING), problem))


def _is_of_other_threads(record: logging.LogRecord) -> bool:
    """Drops the HTTP client's warnings from the display's thread, since the footer shows them."""
    return record.threadName != _THREAD


def _stop(live: Live) -> None:
    with suppress(OSError):  # the terminal was closed: there is nothing to restore
        live.stop()


def _steps_per_epoch(recipe: Recipe, indexes: ShardIndexes) -> int | None:
    # imported late: torch takes seconds
    from hemoco.data.stream.batches import pretraining_plan, steps_per_epoch

    try:
        index = indexes.at(recipe.data.shards)
        return steps_per_epoch(index, recipe.data.pretrain_split, pretraining_plan(recipe.pretrain))
    except HemocoError as error:  # the run itself raises it too, with advice
        logger.debug("event=length_unknown %s", error)
        return None
