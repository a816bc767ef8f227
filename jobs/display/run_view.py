"""The live display of a run: its pretraining and its transfers."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import RenderableType

from hemoco.config import DetectionConfig, PretrainConfig, TransferConfig
from hemoco.results.records import PRETRAINED, done_rows
from hemoco.tracking.runs import RunFacts
from hemoco.tracking.tags import Tag
from jobs.display.facts import Facts, read_facts
from jobs.display.rows import GAP, RUNNING, Rows, clock

_DATA_WAIT = 0.1  # share of the time spent waiting for data above which it is shown
_STALE_S = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The phases that a command works through."""

    run: str
    began_s: float
    """Time when this process began to work on the run, in seconds since 1970."""
    pretrain: PretrainConfig | None
    """None if the backbone is given."""
    steps_per_epoch: int | None
    """None if not known."""
    transfers: Mapping[str, TransferConfig]


class RunView:
    """A run as rows of rich.

    Args:
        plan: the phases of the run.
        now: returns the time in seconds since 1970.
    """

    def __init__(self, plan: Plan, now: Callable[[], float] = time.time) -> None:
        self._plan, self._now, self._rows = plan, now, Rows(now)
        if plan.pretrain is not None:
            total = plan.pretrain.epochs * plan.steps_per_epoch if plan.steps_per_epoch else None
            self._pretraining = self._rows.add_row("pretrain", total)
        self._transfers = {}
        for name, config in plan.transfers.items():
            units = len(config.inits) * len(config.seeds)
            self._transfers[name] = self._rows.add_row(name, units)
        self._first_step: int | None = None
        """Step of the pretraining at the first read of MLflow; an earlier process may have made
        it."""
        self._step = 0
        """Newest step."""
        self._step_seen_s = now()
        """Time when that step was first seen."""

    def update(self, uri: str, experiment_id: str) -> None:
        """Reads MLflow once and shows what it has.

        Raises:
            TrackingError: MLflow does not answer.
        """
        self.show(read_facts(uri, experiment_id, self._plan.run))

    def show(self, facts: Facts) -> None:
        """Shows what MLflow has recorded by now."""
        pretraining = facts.pretraining
        pretrained = self._plan.pretrain is None
        if self._plan.pretrain is not None and pretraining is not None:
            self._show_pretraining(self._plan.pretrain, pretraining)
            pretrained = self._state(pretraining) == "done"
        for name, config in self._plan.transfers.items():
            if name in facts.transfers:
                self._show_transfer(name, config, facts.transfers[name], pretrained)
            elif pretraining is not None:
                self._show_curve_point(name, pretraining)

    def __rich__(self) -> RenderableType:
        return self._rows

    def _show_pretraining(self, config: PretrainConfig, phase: RunFacts) -> None:
        state, step = self._state(phase), phase.steps.get("loss", 0)
        if self._first_step is None:
            self._first_step = self._step = step
        if step != self._step:
            self._step, self._step_seen_s = step, self._now()
        silence_s = self._now() - self._step_seen_s
        if state == RUNNING and step == self._first_step:
            state = "resuming" if step else "starting"
        elif state == RUNNING and silence_s > _STALE_S:
            state = f"last record {clock(silence_s)} ago"
        if state in ("failed", "stopped"):
            values = [phase.tags.get(Tag.ERROR, "")]
        else:
            values = list(self._values(config, phase))
        self._rows.set_row(self._pretraining, step, state, *values)

    def _values(self, config: PretrainConfig, phase: RunFacts) -> Iterator[str]:
        """The newest values of the pretraining."""
        metrics = phase.metrics
        if self._plan.steps_per_epoch:
            epoch = min(self._step // self._plan.steps_per_epoch + 1, config.epochs)
            yield f"epoch {epoch}/{config.epochs}"
        yield from pretraining_values(metrics)
        if metrics.get("data_wait", 0.0) > _DATA_WAIT and phase.status == "RUNNING":
            yield f"data wait {metrics['data_wait']:.0%}"
        if "images_per_s" in metrics:
            yield f"{metrics['images_per_s']:,.0f} images/s"

    def _show_transfer(
        self, name: str, config: TransferConfig, phase: RunFacts, pretrained: bool
    ) -> None:
        state, tags = self._state(phase), phase.tags
        if state == RUNNING and not pretrained:
            state = "waiting"  # the record is of an earlier process, which was killed
        done = {
            tag.removeprefix(Tag.DONE_PREFIX) for tag in tags if tag.startswith(Tag.DONE_PREFIX)
        }
        steps: dict[str, int] = {}  # of each unit that is running, named INIT/seed_N
        for metric, step in phase.steps.items():
            unit = "/".join(metric.split("/")[:2])
            if unit not in done:
                steps[unit] = max(step, steps.get(unit, 0))
        completed = float(len(done))
        if isinstance(config, DetectionConfig):  # units of hours: parts of them count
            completed += sum(step / config.steps for step in steps.values())
        text = ""
        if state == "done":
            text = _headline(phase)
        elif state in ("failed", "stopped"):
            text = tags.get(Tag.ERROR, "")
        elif state == RUNNING and any(steps.values()):
            text = f"step {max(steps.values())}"
        self._rows.set_row(self._transfers[name], completed, state, text)

    def _show_curve_point(self, name: str, pretraining: RunFacts) -> None:
        """Shows the newest value of a transfer that is measured during the pretraining."""
        for metric, value in pretraining.metrics.items():
            if metric.startswith(f"curve/{name}/"):
                point = f"{value:.3f} after epoch {pretraining.steps[metric]}"
                self._rows.set_row(self._transfers[name], 0, "waiting", point)
                return

    def _state(self, phase: RunFacts) -> str:
        """Names the state of a phase.

        One that failed before this process began is waiting: it is going to be tried again.
        """
        if phase.status == "FINISHED":
            return "done"
        if phase.status not in ("FAILED", "KILLED"):
            return RUNNING
        if phase.ended_s is not None and phase.ended_s < self._plan.began_s:
            return "waiting"
        return "failed" if phase.status == "FAILED" else "stopped"


def pretraining_values(metrics: Mapping[str, float]) -> list[str]:
    """Formats the loss and the kNN accuracy of a pretraining, as far as it has them."""
    labels = {"loss": "loss", "knn_top1": "kNN"}
    return [f"{label} {metrics[name]:.3f}" for name, label in labels.items() if name in metrics]


def _headline(transfer: RunFacts) -> str:
    """Formats the means over the seeds, that of the pretrained backbone first."""
    values: dict[str, list[float]] = {}
    for row in done_rows(transfer):
        values.setdefault(row.init, []).append(row.value)
    means = {init: sum(numbers) / len(numbers) for init, numbers in values.items()}
    parts = []
    if PRETRAINED in means:
        parts.append(f"{transfer.tags[Tag.METRIC]} {means.pop(PRETRAINED):.3f}")
    parts += [f"{init} {mean:.3f}" for init, mean in means.items()]
    return GAP.join(parts)
