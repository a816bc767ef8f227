"""The live display of a sweep: the trials that run, the best one so far, and what became of the others."""

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
        sweep: its name.
        config: of the sweep.
        epochs: of a pretraining, where the space does not set them.
        now: the time in seconds since 1970.
    """

    def __init__(
        self, sweep: str, config: SweepConfig, epochs: int, now: Callable[[], float] = time.time
    ) -> None:
        self._sweep, self._config, self._epochs, self._rows = sweep, config, epochs, Rows(now)
        self._all = self._rows.add("trials", config.trials)
        self._running: dict[int, TaskID] = {}
        """The rows of the running trials, by number."""
        self.show(SweepFacts())

    def look(self, uri: str, experiment_id: str) -> None:
        """Reads MLflow once, and shows it.

        Raises:
            TrackingError: it does not answer.
        """
        self.show(read_sweep(uri, experiment_id, self._sweep))

    def show(self, facts: SweepFacts) -> None:
        """Shows what MLflow has recorded by now."""
        counts = collections.Counter(
            RUNNING if trial.status == "RUNNING" else outcome(trial)
            for trial in facts.trials.values()
        )
        waiting = counts["unfinished"] + max(0, self._config.trials - len(facts.trials))
        over = ("finished", "stopped", "failed")
        parts = [f"{counts[name]} {name}" for name in (RUNNING, *over) if counts[name]]
        parts += [f"{waiting} waiting"] if waiting else []
        state = RUNNING if counts[RUNNING] else "waiting" if waiting else "done"
        self._rows.set(self._all, sum(counts[name] for name in over), state, *parts)
        running = {
            number: trial for number, trial in facts.trials.items() if trial.status == "RUNNING"
        }
        for number in self._running.keys() - running.keys():
            self._rows.remove_task(self._running.pop(number))
        for number, trial in running.items():
            self._show_trial(number, trial, facts)
        self._best = self._best_line(facts)

    def __rich__(self) -> RenderableType:
        return Group(self._rows, one_line(self._best))

    def _show_trial(self, number: int, trial: RunFacts, facts: SweepFacts) -> None:
        pretraining, per_epoch = (
            facts.pretrainings.get(number),
            int(trial.tags.get(Tag.STEPS_PER_EPOCH, 0)),
        )
        epochs = int(trial.params.get("pretrain.epochs", self._epochs))
        if number not in self._running:
            self._running[number] = self._rows.add(f"trial {number}", epochs * per_epoch or None)
        row = self._running[number]
        self._rows.update(row, total=epochs * per_epoch or None)
        if pretraining is None or not per_epoch:
            self._rows.set(row, 0, "starting", *_settings(trial))
            return
        step = pretraining.steps.get("loss", 0)
        state = (
            f"measuring {self._config.objective}" if pretraining.status == "FINISHED" else RUNNING
        )
        epoch = f"epoch {min(step // per_epoch + 1, epochs)}/{epochs}"
        self._rows.set(
            row, step, state, epoch, *pretraining_values(pretraining.metrics), *_settings(trial)
        )

    def _best_line(self, facts: SweepFacts) -> Text:
        done = {
            n: each
            for n, each in facts.trials.items()
            if each.status == "FINISHED" and OBJECTIVE in each.metrics
        }
        if not done:
            return Text("best  none has ended yet", style="dim")
        number = max(done, key=lambda number: done[number].metrics[OBJECTIVE])
        value = f"{self._config.objective} {done[number].metrics[OBJECTIVE]:.3f}"
        best = GAP.join(["best", value, f"trial {number}", *_settings(done[number])])
        return Text(best, style=STYLES["done"])


def _settings(trial: RunFacts) -> list[str]:
    """The settings of the space, without the prefix that all names have in common."""
    return [f"{name.removeprefix('pretrain.')} {value}" for name, value in trial.params.items()]
