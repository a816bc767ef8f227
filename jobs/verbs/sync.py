"""`python -m jobs sync RUN`: sends metrics that were stored while MLflow did not answer."""

from functools import partial

from hemoco.errors import RefusedError, TrackingError, UsageError
from hemoco.names import check_run_name
from hemoco.tracking.client import connect, tracking_uri
from hemoco.tracking.metric_queue import send_points
from hemoco.tracking.runs import RunFacts, search
from hemoco.tracking.tags import Tag
from hemoco.tracking.unsent import deliver_file, unsent_files, unsent_folders
from jobs.arguments import Run, read_arguments

_PATIENCE_S = 10.0


def main(argv: list[str]) -> None:
    """Sends the metrics and removes their files."""
    read_arguments(sync, argv, command="sync")


def sync(run: Run, /) -> None:
    """Sends a run's metrics that were stored while MLflow did not answer.

    It can be repeated: each point reaches MLflow once.

    Args:
        run: name of the run.
    """
    check_run_name("RUN", run)
    uri = tracking_uri()
    runs = search(uri, connect(uri), {Tag.RUN: run})
    names = {each.run_id: _phase_name(each) for each in runs}
    folders = unsent_folders(_storage(run, runs))
    refused: list[str] = []
    total = 0
    for run_id in sorted(folders, key=lambda run_id: names.get(run_id, "")):
        name = names.get(run_id, f"MLflow run {run_id}")
        try:
            count = sum(_deliver(uri, run_id, folder) for folder in folders[run_id])
        except RefusedError as error:  # for example a deleted run; the others are still sent
            refused.append(f"{name}: {error}; its metrics stay in {', '.join(folders[run_id])}")
            continue
        total += count
        if count:
            print(f"{name}: {count} points delivered")
    if refused:
        raise TrackingError("; ".join(refused))
    if not total:
        print(f"nothing to deliver: MLflow has all metrics of run {run}")


def _deliver(uri: str, run_id: str, folder: str) -> int:
    send = partial(send_points, uri, run_id, patience_s=_PATIENCE_S)
    return sum(deliver_file(url, send) for url in unsent_files(folder))


def _storage(run: str, runs: list[RunFacts]) -> str:
    """Returns the URL of the run's folder, from the tags of its parent run."""
    parent = next((each for each in runs if each.tags.get(Tag.PHASE) == "parent"), None)
    if parent is None:
        raise UsageError(f"MLflow knows no run {run!r}: check the name and MLFLOW_TRACKING_URI")
    if Tag.STORAGE not in parent.tags:
        raise UsageError(
            f"run {run!r} has no tag hemoco.storage: it was written by a version that did not "
            "store metrics"
        )
    return parent.tags[Tag.STORAGE]


def _phase_name(run: RunFacts) -> str:
    return run.tags.get(Tag.TRANSFER) or run.tags.get(Tag.PHASE, run.run_id)
