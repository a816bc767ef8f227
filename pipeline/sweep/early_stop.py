"""Early stops in a sweep: values that pretrainings record on their way are judged by Ray Tune's ASHA."""

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
    """All that the scheduler asks of a trial."""

    trial_id: str


class Halving:
    """Tune's ASHA, fed by us.

    Args:
        max_epochs: of the longest trial.
        grace_epochs: the first milestone.
        reduction: between two milestones, and of the trials at each.
    """

    def __init__(self, *, max_epochs: int, grace_epochs: int, reduction: int) -> None:
        self._scheduler = ASHAScheduler(
            time_attr="epoch",
            metric="value",
            mode="max",
            max_t=max_epochs,
            grace_period=grace_epochs,
            reduction_factor=reduction,
            stop_last_trials=False,  # else a trial is judged again at milestones that it jumped over
        )
        self._known: set[str] = set()

    def is_bad(self, trial: str, epoch: int, value: float) -> bool:
        """Whether a trial is to stop that has this value after so many epochs; the epochs of a trial ascend."""
        if trial not in self._known:
            self._known.add(trial)
            self._scheduler.on_trial_add(None, _Named(trial))
        decision = self._scheduler.on_trial_result(
            None, _Named(trial), {"epoch": epoch, "value": value}
        )
        return bool(decision == TrialScheduler.STOP)


@dataclasses.dataclass(kw_only=True)
class Watched:
    """A trial whose values count."""

    number: int
    run: str
    """Name of its run."""
    run_id: str
    """Of the trial in MLflow, which gets the values by epoch."""
    url: str
    """Folder of its pretraining."""
    epochs: int
    """Of its pretraining."""
    steps_per_epoch: int
    """Steps of the watched metric in an epoch."""
    live: bool
    """Whether it can be stopped."""
    recorded: frozenset[int] = frozenset()
    """Epochs whose values its run has."""
    judged: set[int] = dataclasses.field(default_factory=set)
    condemned: bool = False


class EarlyStop:
    """Judges the trials of a sweep, in a thread.

    Values are read from MLflow, so that a sweep that goes on after it was killed judges by those of all its trials.

    Args:
        uri: of MLflow.
        experiment_id: in MLflow.
        metric: what is watched, as pretrainings record it.
        reduction: of ASHA, for the verdict.
        rule: ASHA.
    """

    def __init__(
        self, uri: str, experiment_id: str, *, metric: str, reduction: int, rule: Halving
    ) -> None:
        self.uri, self.experiment_id = uri, experiment_id
        self.metric, self.reduction, self.rule = metric, reduction, rule
        self._watched: dict[int, Watched] = {}

    def add(self, trial: Watched) -> None:
        """From now on the trial's values count; also those of one that is over."""
        trial.recorded = frozenset(
            dict(tracking.metric_history(self.uri, trial.run_id, self.metric))
        )
        self._watched[trial.number] = trial

    def end(self, number: int) -> None:
        """The trial cannot be stopped any more."""
        if number in self._watched:
            self._watched[number].live = False

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Judges until the block ends; what was recorded in it is judged."""
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
        """Judges what was recorded since the last look, in the order of the epochs.

        Raises:
            TrackingError: MLflow cannot be used.
            StorageError: a trial cannot be asked to stop.
        """
        new = [
            (epoch, number, value)
            for number in list(self._watched)
            for epoch, value in self._new(number)
        ]
        for epoch, number, value in sorted(new):
            self._judge(self._watched[number], epoch, value)

    def _judge_until(self, done: threading.Event) -> None:
        last = False
        while not last:
            last = done.wait(_LOOK_S)
            try:
                self.look()
            except HemocoError as error:  # trials go on, and the values stay where they are
                logger.warning("event=early_stop_waits reason=%s", error)

    def _new(self, number: int) -> list[tuple[int, float]]:
        trial = self._watched[number]
        wanted = {Tag.RUN: trial.run, Tag.PHASE: "pretrain"}
        pretraining = tracking.find_run(self.uri, self.experiment_id, wanted)
        if pretraining is None:
            return []
        history = tracking.metric_history(self.uri, pretraining.run_id, self.metric)
        found = [(step // trial.steps_per_epoch, value) for step, value in history]
        return [
            (epoch, value)
            for epoch, value in found
            if epoch not in trial.judged and math.isfinite(value)
        ]

    def _judge(self, trial: Watched, epoch: int, value: float) -> None:
        if epoch not in trial.recorded:
            point = MetricPoint(
                key=self.metric, value=value, timestamp=time.time_ns() // 1_000_000, step=epoch
            )
            metric_queue.send_points(self.uri, trial.run_id, [point], patience_s=60.0)
            trial.recorded |= {epoch}
        trial.condemned |= self.rule.is_bad(trial.run, epoch, value)
        trial.judged.add(epoch)
        if trial.condemned and trial.live and epoch < trial.epochs:
            trial.live = False
            verdict = f"{self.metric} {value:.4f} at epoch {epoch} is not among the best 1/{self.reduction} so far"
            tracking.set_tags(self.uri, trial.run_id, {Tag.VERDICT: verdict})
            request_stop(trial.url, "the sweep")
            logger.info("event=early_stop trial=%s %s", trial.run, verdict)
