"""Where runs stand, read from MLflow."""

import dataclasses
import re

from hemoco.errors import UsageError
from hemoco.results.records import unknown_run
from hemoco.storage.objects import join_url, list_names
from hemoco.tracking.client import connect
from hemoco.tracking.runs import RunFacts, close_run, find_run, search
from hemoco.tracking.tags import Tag

# as hemoco.train.checkpoint names them, which imports torch; a test lets it write one
_CHECKPOINT, _MANIFEST = re.compile(r"step_(\d{8,})_a(\d+)"), "manifest.json"
_MOST_PARENTS = 1000
_MOST_CHILDREN = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run or a sweep, and its phases."""

    parent: RunFacts
    phases: tuple[RunFacts, ...]
    """The pretraining and the transfers of a run, or the trials of a sweep; the oldest first."""

    @property
    def is_sweep(self) -> bool:
        """Whether it is a sweep."""
        return self.parent.tags[Tag.PHASE] == "sweep"

    @property
    def run(self) -> str:
        """Name of the run or of the sweep."""
        return self.parent.tags[Tag.SWEEP if self.is_sweep else Tag.RUN]

    @property
    def measured_s(self) -> float | None:
        """When its newest metric was measured, in seconds since 1970."""
        return max(
            (phase.measured_s for phase in self.phases if phase.measured_s is not None),
            default=None,
        )


def newest_runs(uri: str, most: int) -> list[RunStatus]:
    """The runs and sweeps that began last, the newest first; trials are part of their sweep.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    experiment_id = connect(uri)
    parents = search(uri, experiment_id, {Tag.PHASE: "parent"}, limit=_MOST_PARENTS)
    found = [parent for parent in parents if Tag.SWEEP not in parent.tags]
    found += search(uri, experiment_id, {Tag.PHASE: "sweep"}, limit=_MOST_PARENTS)
    found.sort(key=lambda parent: parent.started_s, reverse=True)
    newest: list[RunStatus] = []
    for parent in found:
        status = RunStatus(parent=parent, phases=())
        # a run that --fresh began anew has left its name to the new one
        if len(newest) < most and not status.run.endswith("(superseded)"):
            newest.append(dataclasses.replace(status, phases=_phases(uri, experiment_id, parent)))
    return newest


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
    return RunStatus(parent=parent, phases=_phases(uri, experiment_id, parent))


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
    return [facts.name for facts in left]


def _phases(uri: str, experiment_id: str, parent: RunFacts) -> tuple[RunFacts, ...]:
    children = search(
        uri, experiment_id, {"mlflow.parentRunId": parent.run_id}, limit=_MOST_CHILDREN
    )
    return tuple(reversed(children))
