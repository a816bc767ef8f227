"""State of runs and sweeps, read from MLflow."""

import dataclasses
import re

from hemoco.errors import UsageError
from hemoco.results.records import unknown_run
from hemoco.storage.objects import join_url, list_names
from hemoco.tracking.client import connect
from hemoco.tracking.runs import RunFacts, close_run, find_run, search
from hemoco.tracking.tags import Tag

# The names that hemoco.train.checkpoint gives. Repeated here because importing it imports torch,
# for which `status` need not wait; a test writes a checkpoint with it and finds it with these.
_CHECKPOINT = re.compile(r"step_(\d{8,})_a(\d+)")
_MANIFEST = "manifest.json"
_MOST_PARENTS = 1000
_MOST_CHILDREN = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run or a sweep with its phases."""

    parent: RunFacts
    phases: tuple[RunFacts, ...]
    """The pretraining and the transfers of a run, or the trials of a sweep; oldest first."""

    @property
    def is_sweep(self) -> bool:
        """True for a sweep, False for a run."""
        return self.parent.tags[Tag.PHASE] == "sweep"

    @property
    def run(self) -> str:
        """Name of the run or of the sweep."""
        return self.parent.tags[Tag.SWEEP if self.is_sweep else Tag.RUN]

    @property
    def measured_s(self) -> float | None:
        """Time of the newest metric, in seconds since 1970; None if there is none."""
        times = [phase.measured_s for phase in self.phases if phase.measured_s is not None]
        return max(times, default=None)


def newest_runs(uri: str, most: int) -> list[RunStatus]:
    """Returns the runs and sweeps that began last, newest first; trials belong to their sweep.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    experiment_id = connect(uri)
    parents = search(uri, experiment_id, {Tag.PHASE: "parent"}, limit=_MOST_PARENTS)
    candidates = [parent for parent in parents if Tag.SWEEP not in parent.tags]
    candidates += search(uri, experiment_id, {Tag.PHASE: "sweep"}, limit=_MOST_PARENTS)
    candidates.sort(key=lambda parent: parent.started_s, reverse=True)
    newest: list[RunStatus] = []
    for parent in candidates:
        status = RunStatus(parent=parent, phases=())
        # `--fresh` renames the run that it replaces: "NAME (superseded)"
        if len(newest) < most and not status.run.endswith("(superseded)"):
            newest.append(dataclasses.replace(status, phases=_phases(uri, experiment_id, parent)))
    return newest


def run_status(uri: str, run: str) -> RunStatus:
    """Returns the state of one run.

    Raises:
        UsageError: MLflow has no run of this name.
        TrackingError: MLflow cannot be used.
    """
    experiment_id = connect(uri)
    parent = find_run(uri, experiment_id, {Tag.RUN: run, Tag.PHASE: "parent"})
    if parent is None:
        raise UsageError(unknown_run(run, search(uri, experiment_id, {Tag.PHASE: "parent"})))
    return RunStatus(parent=parent, phases=_phases(uri, experiment_id, parent))


def newest_complete(url: str) -> str | None:
    """Returns the URL of the newest complete checkpoint; None if there is none.

    Only names are read. A training that resumes reads the state as well; if that is damaged, it
    takes an older checkpoint.

    Args:
        url: folder of all checkpoints of a training.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    matches = [match for match in map(_CHECKPOINT.fullmatch, list_names(url)) if match]
    matches.sort(key=lambda match: (int(match[1]), int(match[2])), reverse=True)
    for match in matches:
        checkpoint = join_url(url, match[0])
        # the manifest is written last
        if _MANIFEST in list_names(checkpoint):
            return checkpoint
    return None


def close_running(uri: str, run: str) -> list[str]:
    """Marks the MLflow runs of a run or a sweep that are still `RUNNING` as `KILLED`.

    A process that was killed cannot do this itself.

    Returns:
        The names of the marked MLflow runs.
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
