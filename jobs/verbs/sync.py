"""`python -m jobs sync RUN`: delivers metrics that were kept in storage while MLflow was away."""

from functools import partial
from typing import Annotated

import tyro

from hemoco.errors import RefusedError, TrackingError, UsageError
from hemoco.names import check_run_name
from hemoco.tracking.client import connect, tracking_uri
from hemoco.tracking.metric_queue import send_points
from hemoco.tracking.runs import RunFacts, search
from hemoco.tracking.tags import Tag
from hemoco.tracking.unsent import deliver_file, unsent_files, unsent_folders

_PATIENCE_S = 10.0


def main(argv: list[str]) -> None:
    """Sends the points and removes their files."""
    tyro.cli(sync, args=argv, prog="python -m jobs sync")


def sync(run: Annotated[str, tyro.conf.Positional], /) -> None:
    """Delivers metrics that were kept in storage while MLflow was away; again, as often as you like.

    Args:
        run: the run's name.
    """
    check_run_name("RUN", run)
    uri = tracking_uri()
    runs = search(uri, connect(uri), {Tag.RUN: run})
    names = {found.run_id: _name(found) for found in runs}
    folders = unsent_folders(_storage(run, runs))
    refused: list[str] = []
    total = 0
    for run_id in sorted(folders, key=lambda run_id: names.get(run_id, "")):
        name = names.get(run_id, f"MLflow run {run_id}")
        try:
            count = sum(_deliver(uri, run_id, folder) for folder in folders[run_id])
        except RefusedError as error:
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
    """The run's folder, as its parent run says."""
    parent = next((found for found in runs if found.tags.get(Tag.PHASE) == "parent"), None)
    if parent is None:
        raise UsageError(f"MLflow knows no run {run!r}: check the name and MLFLOW_TRACKING_URI")
    if Tag.STORAGE not in parent.tags:
        raise UsageError(
            f"run {run!r} has no tag hemoco.storage: it is of a version that kept no metrics in storage"
        )
    return parent.tags[Tag.STORAGE]


def _name(found: RunFacts) -> str:
    return found.tags.get(Tag.TRANSFER) or found.tags.get(Tag.PHASE, found.run_id)
