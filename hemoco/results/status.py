"""Where runs stand, read from MLflow."""

import dataclasses
import re

from hemoco.errors import UsageError
from hemoco.results.records import unknown_run
from hemoco.storage.objects import join_url, list_names
from hemoco.tracking.client import connect
from hemoco.tracking.runs import RunFacts, close_run, find_run, search
from hemoco.tracking.tags import Tag

# as hemoco.checkpoint names them, which imports torch; a test lets it write one
_CHECKPOINT, _MANIFEST = re.compile(r"step_(\d{8,})_a(\d+)"), "manifest.json"
_MOST_PARENTS = 1000
_MOST_CHILDREN = 1000


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
    parents = search(uri, experiment_id, {Tag.PHASE: "parent"}, limit=_MOST_PARENTS)
    found = [parent for parent in parents if Tag.SWEEP not in parent.tags]
    found += search(uri, experiment_id, {Tag.PHASE: "sweep"}, limit=_MOST_PARENTS)
    # one that --fresh began anew has left its name to the new one
    current = [parent for parent in found if not _name(parent).endswith("(superseded)")]
    current.sort(key=lambda parent: parent.started_s, reverse=True)
    return [_status(parent, _children(uri, experiment_id, parent)) for parent in current[:most]]


def run_status(uri: str, run: str) -> RunStatus:
    """Where one run stands.

    Raises:
        UsageError: MLflow knows no run of this name.
        TrackingError: MLflow cannot be used.
    """
    experiment_id = connect(uri)
    parent = find_run(uri, experiment_id, {Tag.RUN: run, Tag.PHASE: "parent"})
    if parent is None:
        raise UsageError(unknown_run(run, search(uri, experiment_id, {Tag.PHASE: "parent"})))
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
    of_sweep = search(uri, experiment_id, {Tag.SWEEP: run})
    trials = [facts for facts in of_sweep if facts.tags[Tag.PHASE] == "trial"]
    names = [run, *(f"{run}/{trial.tags['mlflow.runName']}" for trial in trials)]
    of_runs = [facts for name in names for facts in search(uri, experiment_id, {Tag.RUN: name})]
    by_id = {facts.run_id: facts for facts in (*of_sweep, *of_runs)}
    left = [facts for facts in by_id.values() if facts.status == "RUNNING"]
    for facts in left:
        close_run(uri, facts.run_id, "KILLED")
    return [facts.tags.get("mlflow.runName", facts.run_id) for facts in left]


def _children(uri: str, experiment_id: str, parent: RunFacts) -> list[RunFacts]:
    return search(uri, experiment_id, {"mlflow.parentRunId": parent.run_id}, limit=_MOST_CHILDREN)


def _name(parent: RunFacts) -> str:
    return parent.tags[Tag.SWEEP if parent.tags[Tag.PHASE] == "sweep" else Tag.RUN]


def _status(parent: RunFacts, children: list[RunFacts]) -> RunStatus:
    tags = parent.tags
    return RunStatus(
        run=_name(parent),
        recipe=tags.get(Tag.RECIPE, ""),
        status=parent.status,
        started=parent.started_s,
        storage=tags.get(Tag.STORAGE, ""),
        backbone=tags.get(Tag.BACKBONE_URL, ""),
        verb=tags.get(Tag.VERB, ""),
        is_sweep=tags[Tag.PHASE] == "sweep",
        params=parent.params,
        tags=tags,
        phases=tuple(_phase(child) for child in reversed(children)),
    )


def _phase(child: RunFacts) -> PhaseStatus:
    tags = child.tags
    return PhaseStatus(
        name=tags.get("mlflow.runName", child.run_id),
        run_id=child.run_id,
        status=child.status,
        step=max(child.steps.values(), default=None),
        seen=child.measured_s,
        attempts=sum(int(value) for name, value in tags.items() if name.startswith(Tag.ATTEMPT_PREFIX)),
        error=tags.get(Tag.ERROR, ""),
    )
