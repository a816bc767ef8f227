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

_DATA_WAIT = 0.1  # the share above which it is shown
_STALE_S = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The phases of a run."""

    run: str
    began_s: float
    """When this process began to work at it, in seconds since 1970."""
    pretrain: PretrainConfig | None
    """None: the backbone is given."""
    steps_per_epoch: int | None
    """None: not known."""
    transfers: Mapping[str, TransferConfig]


class RunView:
    """A run as rows of rich.

    Args:
        plan: of the run.
        now: the time in seconds since 1970.
    """

    def __init__(self, plan: Plan, now: Callable[[], float] = time.time) -> None:
        self._plan, self._now, self._rows = plan, now, Rows(now)
        if plan.pretrain is not None:
            total = plan.pretrain.epochs * plan.steps_per_epoch if plan.steps_per_epoch else None
            self._pretraining = self._rows.add("pretrain", total)
        units = {
            name: len(config.inits) * len(config.seeds) for name, config in plan.transfers.items()
        }
        self._transfers = {name: self._rows.add(name, total) for name, total in units.items()}
        self._first_step: int | None = None
        """The step of the pretraining when MLflow was first read; it may be from before."""
        self._step, self._record_s = 0, now()
        """The newest step, and when it was seen."""

    def look(self, uri: str, experiment_id: str) -> None:
        """Reads MLflow once, and shows it.

        Raises:
            TrackingError: it does not answer.
        """
        self.show(read_facts(uri, experiment_id, self._plan.run))

    def show(self, facts: Facts) -> None:
        """Shows what MLflow has recorded by now."""
        pretraining = facts.pretraining
        if self._plan.pretrain is not None and pretraining is not None:
            self._show_pretraining(self._plan.pretrain, pretraining)
        pretrained = self._plan.pretrain is None or (
            pretraining is not None and self._state(pretraining) == "done"
        )
        for name, config in self._plan.transfers.items():
            if name in facts.transfers:
                self._show_transfer(name, config, facts.transfers[name], pretrained)
            elif pretraining is not None and (key := _curve_key(pretraining, name)):
                point = f"{pretraining.metrics[key]:.3f} after epoch {pretraining.steps[key]}"
                self._rows.set(self._transfers[name], 0, "waiting", point)

    def __rich__(self) -> RenderableType:
        return self._rows

    def _show_pretraining(self, config: PretrainConfig, phase: RunFacts) -> None:
        state, step = self._state(phase), phase.steps.get("loss", 0)
        if self._first_step is None:
            self._first_step = self._step = step
        if step != self._step:
            self._step, self._record_s = step, self._now()
        silence_s = self._now() - self._record_s
        if state == RUNNING and step == self._first_step:
            state = "resuming" if step else "starting"
        elif state == RUNNING and silence_s > _STALE_S:
            state = f"last record {clock(silence_s)} ago"
        values = [phase.tags.get(Tag.ERROR, "")]
        if state not in ("failed", "stopped"):
            values = list(self._values(config, phase))
        self._rows.set(self._pretraining, step, state, *values)

    def _values(self, config: PretrainConfig, phase: RunFacts) -> Iterator[str]:
        metrics = phase.metrics
        if self._plan.steps_per_epoch:
            yield f"epoch {min(self._step // self._plan.steps_per_epoch + 1, config.epochs)}/{config.epochs}"
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
            state = "waiting"  # it is from before, left by a process that is gone
        done = {
            tag.removeprefix(Tag.DONE_PREFIX) for tag in tags if tag.startswith(Tag.DONE_PREFIX)
        }
        steps: dict[str, int] = {}  # of the units in work
        for key, step in phase.steps.items():
            unit = "/".join(key.split("/")[:2])
            if unit not in done:
                steps[unit] = max(step, steps.get(unit, 0))
        shares = (
            [step / config.steps for step in steps.values()]
            if isinstance(config, DetectionConfig)
            else []
        )
        text = ""
        if state == "done":
            text = _headline(phase)
        elif state in ("failed", "stopped"):
            text = tags.get(Tag.ERROR, "")
        elif state == RUNNING and any(steps.values()):
            text = f"step {max(steps.values())}"
        self._rows.set(self._transfers[name], len(done) + sum(shares), state, text)

    def _state(self, phase: RunFacts) -> str:
        """The state of a phase; one that failed before this process began is going to be tried again."""
        status = phase.status
        if status in ("FAILED", "KILLED"):
            if phase.ended_s is not None and phase.ended_s < self._plan.began_s:
                return "waiting"
            return "failed" if status == "FAILED" else "stopped"
        return "done" if status == "FINISHED" else RUNNING


def pretraining_values(metrics: Mapping[str, float]) -> list[str]:
    """The loss and the kNN accuracy of a pretraining, where it has them."""
    labels = {"loss": "loss", "knn_top1": "kNN"}
    return [f"{label} {metrics[name]:.3f}" for name, label in labels.items() if name in metrics]


def _curve_key(facts: RunFacts, transfer: str) -> str:
    """The metric of a transfer that is measured during the pretraining; empty where it is not."""
    return next((key for key in facts.metrics if key.startswith(f"curve/{transfer}/")), "")


def _headline(facts: RunFacts) -> str:
    """The mean over the seeds of the pretrained backbone, and of the others behind it."""
    values: dict[str, list[float]] = {}
    for row in done_rows(facts):
        values.setdefault(row.init, []).append(row.value)
    means = {init: sum(found) / len(found) for init, found in values.items()}
    parts = [f"{facts.tags[Tag.METRIC]} {means.pop(PRETRAINED):.3f}"] if PRETRAINED in means else []
    return GAP.join([*parts, *(f"{init} {mean:.3f}" for init, mean in means.items())])
