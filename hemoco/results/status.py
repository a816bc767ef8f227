"""Where runs stand, read from MLflow."""

import dataclasses
import re
from typing import Any

from hemoco.errors import UsageError
from hemoco.results.records import unknown_run
from hemoco.storage.objects import join_url, list_names
from hemoco.tracking.client import ask, connect
from hemoco.tracking.runs import close_run, find_runs
from hemoco.tracking.tags import Tag

# as hemoco.checkpoint names them, which imports torch; a test lets it write one
_CHECKPOINT, _MANIFEST = re.compile(r"step_(\d{8,})_a(\d+)"), "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseStatus:
    """One MLflow run of a run: its pretraining, or a transfer."""

    name: str
    """pretrain, a transfer's name, or NAME@EPOCH of a transfer measured during pretraining."""
    run_id: str
    status: str
    step: int | None
    """The highest of its metrics; None where there are none."""
    seen: float | None
    """When its newest metric was measured, in seconds since 1970."""
    attempts: int
    """Starts of what it consists of, above their number where some were tried again; 0 where none are counted."""
    error: str
    """Why it failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run and its phases."""

    run: str
    recipe: str
    status: str
    """Of its parent run in MLflow."""
    started: float
    """Seconds since 1970."""
    storage: str
    """URL of its folder; empty where an older version did not record it."""
    backbone: str
    """URL of the backbone that it began with; empty if it pretrains its own."""
    verb: str
    """Of `python -m jobs`, which worked at it last; empty where an older version did not record it."""
    is_sweep: bool
    """Then its phases are its trials."""
    params: dict[str, str]
    """Every setting by its dotted name."""
    tags: dict[str, str]
    """Of its parent run in MLflow."""
    phases: tuple[PhaseStatus, ...]
    """The oldest first."""

    @property
    def seen(self) -> float | None:
        """When its newest metric was measured."""
        return max((phase.seen for phase in self.phases if phase.seen is not None), default=None)


def newest_runs(uri: str, most: int) -> list[RunStatus]:
    """The runs and sweeps that began last, the newest first; trials are part of their sweep.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    experiment_id = connect(uri)
    parents = _search(uri, experiment_id, "tags.`hemoco.phase` = 'parent'", 1000)
    found = [parent for parent in parents if Tag.SWEEP not in parent.data.tags]
    found += _search(uri, experiment_id, "tags.`hemoco.phase` = 'sweep'", 1000)
    # one that --fresh began anew has left its name to the new one
    current = [parent for parent in found if not _name(parent).endswith("(superseded)")]
    current.sort(key=lambda parent: parent.info.start_time, reverse=True)
    return [_status(parent, _children(uri, experiment_id, parent)) for parent in current[:most]]


def run_status(uri: str, run: str) -> RunStatus:
    """Where one run stands.

    Raises:
        UsageError: MLflow knows no run of this name.
        TrackingError: MLflow cannot be used.
    """
    experiment_id = connect(uri)
    known = find_runs(uri, experiment_id, {Tag.RUN: run, Tag.PHASE: "parent"})
    if not known:
        raise UsageError(unknown_run(run, find_runs(uri, experiment_id, {Tag.PHASE: "parent"})))
    parent = ask(uri, lambda client: client.get_run(known[0].run_id))
    return _status(parent, _children(uri, experiment_id, parent))


def newest_complete(url: str) -> str | None:
    """The URL of the newest checkpoint that was written to its end; None where there is none.

    From names alone: its state is not read, a resuming training may find it damaged and take an older one.

    Args:
        url: folder of all checkpoints of a training.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    places = [match for name in list_names(url) if (match := _CHECKPOINT.fullmatch(name))]
    for place in sorted(places, key=lambda match: (int(match[1]), int(match[2])), reverse=True):
        checkpoint = join_url(url, place[0])
        if _MANIFEST in list_names(checkpoint):
            return checkpoint
    return None


def close_running(uri: str, run: str) -> list[str]:
    """Marks what of a run or a sweep MLflow still takes for running as killed: a process that has been ended cannot.

    Returns:
        The names of what was marked.
    """
    experiment_id = connect(uri)
    of_sweep = find_runs(uri, experiment_id, {Tag.SWEEP: run})
    trials = [facts for facts in of_sweep if facts.tags[Tag.PHASE] == "trial"]
    names = [run, *(f"{run}/{trial.tags['mlflow.runName']}" for trial in trials)]
    of_runs = [facts for name in names for facts in find_runs(uri, experiment_id, {Tag.RUN: name})]
    by_id = {facts.run_id: facts for facts in (*of_sweep, *of_runs)}
    left = [facts for facts in by_id.values() if facts.status == "RUNNING"]
    for facts in left:
        close_run(uri, facts.run_id, "KILLED")
    return [facts.tags.get("mlflow.runName", facts.run_id) for facts in left]


def _search(uri: str, experiment_id: str, wanted: str, most: int) -> list[Any]:
    order = ["attributes.start_time DESC"]
    return list(ask(uri, lambda client: client.search_runs([experiment_id], wanted, max_results=most, order_by=order)))


def _children(uri: str, experiment_id: str, parent: Any) -> list[Any]:
    return _search(uri, experiment_id, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", 1000)


def _name(parent: Any) -> str:
    tags = parent.data.tags
    return str(tags[Tag.SWEEP if tags[Tag.PHASE] == "sweep" else Tag.RUN])


def _status(parent: Any, children: list[Any]) -> RunStatus:
    tags = parent.data.tags
    return RunStatus(
        run=_name(parent),
        recipe=tags.get(Tag.RECIPE, ""),
        status=parent.info.status,
        started=parent.info.start_time / 1000,
        storage=tags.get(Tag.STORAGE, ""),
        backbone=tags.get(Tag.BACKBONE_URL, ""),
        verb=tags.get(Tag.VERB, ""),
        is_sweep=tags[Tag.PHASE] == "sweep",
        params=dict(parent.data.params),
        tags=dict(tags),
        phases=tuple(_phase(child) for child in reversed(children)),
    )


def _phase(child: Any) -> PhaseStatus:
    tags = child.data.tags
    points = child.data.to_proto().metrics  # the dictionary of metrics has neither step nor time
    return PhaseStatus(
        name=tags.get("mlflow.runName", child.info.run_id),
        run_id=child.info.run_id,
        status=child.info.status,
        step=max((point.step for point in points), default=None),
        seen=max((point.timestamp / 1000 for point in points), default=None),
        attempts=sum(int(value) for name, value in tags.items() if name.startswith(Tag.ATTEMPT_PREFIX)),
        error=tags.get(Tag.ERROR, ""),
    )
