"""The live display of a run where output is a terminal: what MLflow says of it, with all other lines scrolling above.

It reads MLflow in a thread of its own and nothing else, so it shows alike what runs here and what runs on a cluster. It
never raises into the run, and never makes it wait for MLflow.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol, TextIO, cast

from rich.console import Console, RenderableType
from rich.live import Live

from hemoco.config import Recipe, TransferConfig
from hemoco.data.shards.index import ShardIndexes
from hemoco.data.stream.batches import pretraining_plan, steps_per_epoch
from hemoco.errors import HemocoError, first_line
from hemoco.tracking.client import connect, tracking_uri
from jobs.display.facts import Facts, read_facts
from jobs.display.lines import Frames, lines_above
from jobs.display.run_view import Pace, Picture, Plan

logger = logging.getLogger(__name__)

_POLL_S = 2.0
_BUSY = 4  # an MLflow that takes long is asked less often: so many times as long is it left alone
_LAST_LOOK_S = 1.0
_REFRESH_PER_S = 2
_THREAD = "hemoco-live"


@contextmanager
def live_display(
    run: str, *, pretrain: Recipe | None, transfers: Mapping[str, TransferConfig], indexes: ShardIndexes
) -> Iterator[None]:
    """Shows where a run is while the block works at it, as `displayed` does.

    Args:
        run: its name.
        pretrain: the recipe it pretrains by; None: its backbone is given.
        transfers: that it measures, by name.
        indexes: of this command.
    """

    def scene() -> _RunScene:
        plan = Plan(
            run=run,
            began_s=time.time(),
            pretrain=pretrain.pretrain if pretrain else None,
            steps_per_epoch=_steps_per_epoch(pretrain, indexes) if pretrain else None,
            curve=bool(pretrain and pretrain.curve),
            transfers=transfers,
        )
        return _RunScene(plan)

    with displayed(scene):
        yield


class Scene(Protocol):
    """What a display shows, and how it learns of it."""

    def look(self, uri: str, experiment_id: str) -> None:
        """Asks MLflow once; in a thread of its own.

        Raises:
            TrackingError: it does not answer.
        """

    def picture(self, now_s: float, silence_s: float, problem: str) -> RenderableType:
        """Of what was last heard: silence_s ago, because of the problem if one is named."""


@contextmanager
def displayed(scene: Callable[[], Scene]) -> Iterator[None]:
    """Shows a scene while the block works; where output is no terminal it does nothing, and makes none.

    MLflow must have been connected to before: two threads must not import it at the same time.
    """
    console = terminal()
    if console is None:
        yield
        return
    watcher = _Watcher(scene(), tracking_uri())
    live = Live(
        console=console,
        get_renderable=watcher.picture,
        refresh_per_second=_REFRESH_PER_S,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with ExitStack() as stack:
        stack.callback(_end, live)
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
    console = Console(file=cast(TextIO, Frames(sys.stdout)))
    return console if console.is_terminal and console.is_interactive and not console.is_dumb_terminal else None


class _RunScene:
    """A run, by its plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._facts, self._pace = plan, Facts(), Pace()

    def look(self, uri: str, experiment_id: str) -> None:
        """As `Scene` says."""
        self._facts = read_facts(uri, experiment_id, self._plan.run)
        training = self._facts.pretraining
        self._pace.note(training.steps.get("loss", 0) if training else 0, time.time())

    def picture(self, now_s: float, silence_s: float, problem: str) -> Picture:
        """As `Scene` says."""
        return Picture(
            plan=self._plan,
            facts=self._facts,
            pace=self._pace,
            now_s=now_s,
            silence_s=silence_s,
            problem=problem,
        )


class _Watcher:
    """Asks MLflow every few seconds, in a daemon thread: one that waits for an answer must not keep the run."""

    def __init__(self, scene: Scene, uri: str) -> None:
        self._scene, self._uri = scene, uri
        self._experiment_id, self._problem = "", ""
        self._answered_s = time.time()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=_THREAD, daemon=True)

    def begin(self) -> None:
        """Asks from now on."""
        logging.getLogger("urllib3.connectionpool").addFilter(_asked_by_others)
        self._thread.start()

    def end(self) -> None:
        """Asks a last time, if MLflow answers at once."""
        self._ending.set()
        self._thread.join(_LAST_LOOK_S)

    def picture(self) -> RenderableType:
        """Of what was last heard."""
        now_s = time.time()
        return self._scene.picture(now_s, now_s - self._answered_s, self._problem)

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._ending.is_set()  # before asking: what the run said at its end is seen
            began_s = time.monotonic()
            try:
                self._look()
            except Exception as error:  # of any kind: it must not touch the run, and is shown
                self._problem = first_line(error)
                logger.debug("event=no_answer", exc_info=True)
            self._ending.wait(max(_POLL_S, _BUSY * (time.monotonic() - began_s)))

    def _look(self) -> None:
        self._experiment_id = self._experiment_id or connect(self._uri)
        self._scene.look(self._uri, self._experiment_id)
        self._answered_s, self._problem = time.time(), ""


def _asked_by_others(record: logging.LogRecord) -> bool:
    """Whether a warning of the HTTP client is news: that MLflow does not answer us is shown already."""
    return record.threadName != _THREAD


def _end(live: Live) -> None:
    with suppress(OSError):  # the terminal is gone: there is nothing to restore
        live.stop()


def _steps_per_epoch(recipe: Recipe, indexes: ShardIndexes) -> int | None:
    try:
        index = indexes.at(recipe.data.shards)
        return steps_per_epoch(index, recipe.data.pretrain_split, pretraining_plan(recipe.pretrain))
    except HemocoError as error:  # the run will say so itself, and better
        logger.debug("event=length_unknown %s", error)
        return None
