"""The live display of a sweep: its running trials, the best one so far, counts of the others."""

import collections
import time
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.progress import TaskID
from rich.text import Text

from hemoco.config.sweep import SweepConfig
from hemoco.results.sweep import OBJECTIVE, outcome
from hemoco.tracking.runs import RunFacts
from hemoco.tracking.tags import Tag
from jobs.display.facts import SweepFacts, read_sweep
from jobs.display.rows import GAP, RUNNING, STYLES, Rows, one_line
from jobs.display.run_view import pretraining_values


class SweepView:
    """A sweep as rows of rich: one for the sweep, and one for each running trial.

    Args:
        sweep: name of the sweep.
        config: its settings.
        epochs: epochs of a pretraining, if the search space does not set them.
        now: returns the time in seconds since 1970.
    """

    def __init__(
        self, sweep: str, config: SweepConfig, epochs: int, now: Callable[[], float] = time.time
    ) -> None:
        self._sweep, self._config, self._epochs, self._rows = sweep, config, epochs, Rows(now)
        self._total = self._rows.add_row("trials", config.trials)
        self._running: dict[int, TaskID] = {}
        """Rows of the running trials, by number."""
        self.show(SweepFacts())

    def update(self, uri: str, experiment_id: str) -> None:
        """Reads MLflow once and shows what it has.

        Raises:
            TrackingError: MLflow does not answer.
        """
        self.show(read_sweep(uri, experiment_id, self._sweep))

    def show(self, facts: SweepFacts) -> None:
        """Shows what MLflow has recorded by now."""
        running = {}
        counts: collections.Counter[str] = collections.Counter()
        for number, trial in facts.trials.items():
            if trial.status == "RUNNING":
                running[number] = trial
            else:
                counts[outcome(trial)] += 1
        self._show_counts(len(running), counts, opened=len(facts.trials))
        for number in self._running.keys() - running.keys():
            self._rows.remove_task(self._running.pop(number))
        for number, trial in running.items():
            self._show_trial(number, trial, facts.pretrainings.get(number))
        self._best = self._best_line(facts)

    def __rich__(self) -> RenderableType:
        return Group(self._rows, one_line(self._best))

    def _show_counts(self, running: int, counts: collections.Counter[str], opened: int) -> None:
        waiting = counts["unfinished"] + max(0, self._config.trials - opened)
        ended = {name: counts[name] for name in ("finished", "stopped", "failed")}
        state = "waiting" if waiting else "done"
        if running:
            state = RUNNING
        shown = {RUNNING: running, **ended, "waiting": waiting}
        parts = [f"{count} {name}" for name, count in shown.items() if count]
        self._rows.set_row(self._total, sum(ended.values()), state, *parts)

    def _show_trial(self, number: int, trial: RunFacts, pretraining: RunFacts | None) -> None:
        steps_per_epoch = int(trial.tags.get(Tag.STEPS_PER_EPOCH, 0))
        epochs = int(trial.params.get("pretrain.epochs", self._epochs))
        total = epochs * steps_per_epoch or None  # None: not known yet
        if number not in self._running:
            self._running[number] = self._rows.add_row(f"trial {number}", total)
        row = self._running[number]
        self._rows.update(row, total=total)
        if pretraining is None or not steps_per_epoch:
            self._rows.set_row(row, 0, "starting", *_settings(trial))
            return
        step = pretraining.steps.get("loss", 0)
        state = RUNNING
        if pretraining.status == "FINISHED":
            state = f"measuring {self._config.objective}"
        epoch = f"epoch {min(step // steps_per_epoch + 1, epochs)}/{epochs}"
        values = [epoch, *pretraining_values(pretraining.metrics), *_settings(trial)]
        self._rows.set_row(row, step, state, *values)

    def _best_line(self, facts: SweepFacts) -> Text:
        finished = [
            number
            for number, trial in facts.trials.items()
            if trial.status == "FINISHED" and OBJECTIVE in trial.metrics
        ]
        if not finished:
            return Text("best  no trial has finished yet", style="dim")
        best = max(finished, key=lambda number: facts.trials[number].metrics[OBJECTIVE])
        trial = facts.trials[best]
        value = f"{self._config.objective} {trial.metrics[OBJECTIVE]:.3f}"
        line = GAP.join(["best", value, f"trial {best}", *_settings(trial)])
        return Text(line, style=STYLES["done"])


def _settings(trial: RunFacts) -> list[str]:
    """Formats the settings of a trial without the prefix `pretrain.`, which all of them have."""
    return [f"{name.removeprefix('pretrain.')} {value}" for name, value in trial.params.items()]
