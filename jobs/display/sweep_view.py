"""The live display of a sweep: the trials that run, the best one so far, and what became of the others."""

import collections
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from hemoco.config import Recipe
from hemoco.config.sweep import SweepConfig
from hemoco.results.sweep import OBJECTIVE, Outcome, outcome
from hemoco.tracking.runs import RunFacts, search
from hemoco.tracking.tags import Tag
from jobs.display.facts import MOST_RUNS
from jobs.display.live import displayed
from jobs.display.run_view import GAP, STYLES, State, fitting, footer, lines_within, name_column, named_row

_STATES: dict[Outcome, State] = {"finished": "done", "stopped": "stopped", "failed": "failed", "unfinished": "waiting"}
_NAMES = ("trial 0000", "best", "trials", "elapsed")


@contextmanager
def live_sweep(sweep: str, recipe: Recipe) -> Iterator[None]:
    """Shows where a sweep is while the block works at it, as `displayed` does.

    Args:
        sweep: its name.
        recipe: with a `sweep`.
    """
    assert recipe.sweep is not None, "a recipe without one is no sweep"
    config, began_s = recipe.sweep, time.time()
    with displayed(lambda: _SweepScene(sweep, config, recipe.pretrain.epochs, began_s)):
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepFacts:
    """What MLflow knows of a sweep."""

    trials: tuple[RunFacts, ...] = ()
    """The trials that were opened, by number."""
    pretrainings: Mapping[int, tuple[RunFacts, int]] = dataclasses.field(default_factory=dict)
    """Of the trials that have begun: the pretraining and its newest step, by the trial's number."""


def read_sweep(uri: str, experiment_id: str, sweep: str) -> SweepFacts:
    """What MLflow knows of a sweep now, by two questions that are asked once.

    Raises:
        TrackingError: MLflow does not answer.
    """
    pretrainings = {}
    for facts in reversed(
        search(
            uri,
            experiment_id,
            {Tag.PHASE: "pretrain"},
            prefix={Tag.RUN: f"{sweep}/trial_"},
            limit=MOST_RUNS,
            patience_s=0.0,
        )
    ):
        number = facts.tags[Tag.RUN].rpartition("/trial_")[2]
        if number.isdigit():
            pretrainings[int(number)] = facts, facts.steps.get("loss", 0)  # of a repeated one the newest
    opened = search(uri, experiment_id, {Tag.PHASE: "trial", Tag.SWEEP: sweep}, limit=MOST_RUNS, patience_s=0.0)
    trials = {_number(facts): facts for facts in reversed(opened)}
    return SweepFacts(trials=tuple(trials[number] for number in sorted(trials)), pretrainings=pretrainings)


class _SweepScene:
    """A sweep, as `Scene` says."""

    def __init__(self, sweep: str, config: SweepConfig, epochs: int, began_s: float) -> None:
        self._sweep, self._config, self._epochs, self._began_s = sweep, config, epochs, began_s
        self._facts = SweepFacts()

    def look(self, uri: str, experiment_id: str) -> None:
        """As `Scene` says."""
        self._facts = read_sweep(uri, experiment_id, self._sweep)

    def picture(self, now_s: float, silence_s: float, problem: str) -> "SweepPicture":
        """As `Scene` says."""
        return SweepPicture(
            sweep=self._sweep,
            config=self._config,
            epochs=self._epochs,
            facts=self._facts,
            elapsed_s=now_s - self._began_s,
            silence_s=silence_s,
            problem=problem,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepPicture:
    """A sweep at one moment; rich draws it, always with the same number of lines."""

    sweep: str
    config: SweepConfig
    epochs: int
    """Of a pretraining, where the space says nothing else."""
    facts: SweepFacts
    elapsed_s: float
    silence_s: float
    """Since MLflow last answered."""
    problem: str
    """Why it did not; empty where it did."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from lines_within(options.max_width, self._lines)

    def _lines(self, width: int) -> Iterable[Text]:
        column = name_column(max(map(len, _NAMES)), width)
        room = width - column
        yield Text()
        running = [trial for trial in self.facts.trials if trial.status == "RUNNING"]
        slots = min(self.config.max_concurrent, self.config.trials)
        for trial in running[:slots]:
            yield named_row(f"trial {_number(trial)}", column) + fitting(self._running(trial), room)
        yield from (Text() for _ in range(slots - len(running)))
        yield named_row("best", column) + fitting(self._best(), room)
        yield named_row("trials", column) + fitting(self._counts(len(running)), room)
        yield named_row("elapsed", column) + footer(self.sweep, self.elapsed_s, self.silence_s, self.problem, room)

    def _running(self, trial: RunFacts) -> list[Text]:
        """What it is at, then its settings."""
        begun, settings = self.facts.pretrainings.get(_number(trial)), _settings(trial)
        if begun is None or Tag.STEPS_PER_EPOCH not in trial.tags:
            return [Text("starting", style=STYLES["running"]), *settings]
        facts, step = begun
        epochs = int(trial.params.get("pretrain.epochs", self.epochs))
        epoch = min(step // int(trial.tags[Tag.STEPS_PER_EPOCH]) + 1, epochs)
        parts = [Text(f"epoch {epoch:>{len(str(epochs))}}/{epochs}", style=STYLES["running"])]
        if facts.status == "FINISHED":
            parts = [Text(f"measuring {self.config.objective}", style=STYLES["running"])]
        for name, word in (("loss", "loss"), ("knn_top1", "kNN")):
            if name in facts.metrics:
                parts.append(Text(f"{word} {facts.metrics[name]:.3f}"))
        return [*parts, *settings]

    def _best(self) -> list[Text]:
        done = [trial for trial in self.facts.trials if trial.status == "FINISHED" and OBJECTIVE in trial.metrics]
        if not done:
            return [Text("none has ended yet", style="dim")]
        best = max(done, key=lambda trial: trial.metrics[OBJECTIVE])
        words = f"{self.config.objective} {best.metrics[OBJECTIVE]:.3f}{GAP}trial {_number(best)}"
        return [Text(words, style=STYLES["done"]), *_settings(best)]

    def _counts(self, running: int) -> list[Text]:
        over = collections.Counter(outcome(trial) for trial in self.facts.trials if trial.status != "RUNNING")
        over["unfinished"] += max(0, self.config.trials - len(self.facts.trials))
        parts = [Text(f"{running} running", style=STYLES["running"])] if running else []
        for name, state in _STATES.items():
            if over[name]:
                word = "waiting" if name == "unfinished" else name
                parts.append(Text(f"{over[name]} {word}", style=STYLES[state]))
        return parts


def _number(trial: RunFacts) -> int:
    return int(trial.tags[Tag.TRIAL])


def _settings(trial: RunFacts) -> list[Text]:
    """Of the space, without what all names have in common."""
    return [Text(f"{name.removeprefix('pretrain.')} {value}", style="dim") for name, value in trial.params.items()]
