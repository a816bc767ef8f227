"""Early stops in a sweep: Ray Tune's ASHA judges the values that pretrainings record.

ASHA (Li et al., arXiv:1810.05934) compares each trial, at certain epochs (milestones), with the
values that other trials had at the same epoch. It stops those that are not among the best.
"""

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from hemoco.errors import HemocoError
from hemoco.tracking import metric_queue
from hemoco.tracking import runs as tracking
from hemoco.tracking.tags import Tag
from hemoco.tracking.unsent import MetricPoint
from pipeline.workers.stop_request import request_stop

logger = logging.getLogger(__name__)

_LOOK_S = 5.0


class _Named(NamedTuple):
    """Stands for a trial of Ray Tune: ASHA reads its id only (test_sweep)."""

    trial_id: str


class Halving:
    """Ray Tune's ASHA without Ray Tune's trials.

    Args:
        max_epochs: epochs of the longest trial.
        grace_epochs: epoch of the first milestone.
        reduction: factor between two milestones; at each, the best 1 / reduction of the trials
            continue.
    """

    def __init__(self, *, max_epochs: int, grace_epochs: int, reduction: int) -> None:
        self._scheduler = ASHAScheduler(
            time_attr="epoch",
            metric="value",
            mode="max",
            max_t=max_epochs,
            grace_period=grace_epochs,
            reduction_factor=reduction,
            # otherwise a trial would be judged again at milestones that it has jumped over
            stop_last_trials=False,
        )
        self._known: set[str] = set()

    def is_bad(self, trial: str, epoch: int, value: float) -> bool:
        """Judges a trial by its value after an epoch; call it in the order of its epochs.

        Returns:
            Whether the trial is to stop.
        """
        if trial not in self._known:
            self._known.add(trial)
            self._scheduler.on_trial_add(None, _Named(trial))
        decision = self._scheduler.on_trial_result(
            None, _Named(trial), {"epoch": epoch, "value": value}
        )
        return bool(decision == TrialScheduler.STOP)


@dataclasses.dataclass(kw_only=True)
class Watched:
    """A trial whose values are judged."""

    number: int
    run: str
    """Name of its run."""
    run_id: str
    """MLflow's id of the trial, which receives the values by epoch."""
    url: str
    """URL of its pretraining's folder."""
    epochs: int
    """Epochs of its pretraining."""
    steps_per_epoch: int
    """Steps of the watched metric in an epoch."""
    live: bool
    """True while it can be stopped."""
    recorded: frozenset[int] = frozenset()
    """Epochs whose values the trial has in MLflow."""
    judged: set[int] = dataclasses.field(default_factory=set)
    """Epochs whose values have been judged."""
    is_bad: bool = False
    """True once it was judged to stop."""


class EarlyStop:
    """Judges the trials of a sweep, in a thread.

    The values are read from MLflow, so that a sweep that was killed and resumed judges by those of
    all its trials.

    Args:
        uri: URI of MLflow.
        experiment_id: experiment in MLflow.
        metric: name of the watched metric of the pretrainings.
        reduction: ASHA's reduction, for the message.
        rule: ASHA.
    """

    def __init__(
        self, uri: str, experiment_id: str, *, metric: str, reduction: int, rule: Halving
    ) -> None:
        self.uri, self.experiment_id = uri, experiment_id
        self.metric, self.reduction, self.rule = metric, reduction, rule
        self._watched: dict[int, Watched] = {}

    def add(self, trial: Watched) -> None:
        """Adds a trial, whose values count from now on, also if it is over."""
        history = tracking.metric_history(self.uri, trial.run_id, self.metric)
        trial.recorded = frozenset(epoch for epoch, _ in history)
        self._watched[trial.number] = trial

    def end(self, number: int) -> None:
        """Marks a trial as over; it is not stopped any more."""
        if number in self._watched:
            self._watched[number].live = False

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Judges in a thread until the block ends, including the last values recorded in it."""
        done = threading.Event()
        thread = threading.Thread(
            target=self._judge_until, args=(done,), name="hemoco-early-stop", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=60)

    def look(self) -> None:
        """Judges the values recorded since the last call, in the order of their epochs.

        Raises:
            TrackingError: MLflow cannot be used.
            StorageError: a trial cannot be asked to stop.
        """
        new = []
        for number in list(self._watched):  # a copy: other threads add trials
            new += [(epoch, number, value) for epoch, value in self._new_values(number)]
        for epoch, number, value in sorted(new):
            self._judge(self._watched[number], epoch, value)

    def _judge_until(self, done: threading.Event) -> None:
        last = False
        while not last:
            last = done.wait(_LOOK_S)
            try:
                self.look()
            except HemocoError as error:  # trials continue, and MLflow still has the values later
                logger.warning("event=early_stop_waits reason=%s", error)

    def _new_values(self, number: int) -> list[tuple[int, float]]:
        """Returns a trial's values that are not judged yet, as (epoch, value)."""
        trial = self._watched[number]
        tags = {Tag.RUN: trial.run, Tag.PHASE: "pretrain"}
        pretraining = tracking.find_run(self.uri, self.experiment_id, tags)
        if pretraining is None:
            return []
        values = []
        for step, value in tracking.metric_history(self.uri, pretraining.run_id, self.metric):
            epoch = step // trial.steps_per_epoch
            if epoch not in trial.judged and math.isfinite(value):
                values.append((epoch, value))
        return values

    def _judge(self, trial: Watched, epoch: int, value: float) -> None:
        if epoch not in trial.recorded:
            point = MetricPoint(
                key=self.metric, value=value, timestamp=time.time_ns() // 1_000_000, step=epoch
            )
            metric_queue.send_points(self.uri, trial.run_id, [point], patience_s=60.0)
            trial.recorded |= {epoch}
        trial.is_bad |= self.rule.is_bad(trial.run, epoch, value)
        trial.judged.add(epoch)
        if trial.is_bad and trial.live and epoch < trial.epochs:
            trial.live = False
            verdict = (
                f"{self.metric} {value:.4f} at epoch {epoch} "
                f"is not among the best 1/{self.reduction} so far"
            )
            tracking.set_tags(self.uri, trial.run_id, {Tag.VERDICT: verdict})
            request_stop(trial.url, "the sweep")
            logger.info("event=early_stop trial=%s %s", trial.run, verdict)
