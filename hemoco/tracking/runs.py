"""The door to MLflow: runs are opened, tagged, read and closed here, and metrics sent without blocking training.

mlflow is imported inside functions: it takes seconds, and `import hemoco` must not need it.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from hemoco.errors import UsageError
from hemoco.tracking.client import ask
from hemoco.tracking.tags import Tag
from hemoco.tracking.unsent import MetricPoint

DIGEST_LENGTH = 36
"""MLflow keeps so many characters of a data set's digest."""
_PAGE = 500
"""Runs in one answer to a search."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One run in MLflow; times are in seconds since 1970."""

    run_id: str
    status: str
    started_s: float
    """When it first began."""
    ended_s: float | None
    """When it last ended, also of a run that was reopened since; None if it never ended."""
    measured_s: float | None
    """When its newest metric was measured; None if it has none."""
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    """Values of the highest step."""
    steps: dict[str, int]
    """That step, by the metric's name."""

    @property
    def name(self) -> str:
        """Its name in MLflow: pretrain, a transfer's name, NAME@EPOCH of one measured during the pretraining."""
        return self.tags.get("mlflow.runName", self.run_id)


def open_run(
    uri: str,
    experiment_id: str,
    *,
    name: str,
    parent: str | None,
    tags: dict[str, str],
    params: dict[str, str],
) -> str:
    """Starts a run, below a parent run if one is named, and returns its id."""
    tags = tags | ({"mlflow.parentRunId": parent} if parent else {})
    run_id = str(
        ask(
            uri, lambda client: client.create_run(experiment_id, run_name=name, tags=tags)
        ).info.run_id
    )
    from mlflow.entities import Param

    entities = [Param(key, value) for key, value in params.items()]
    parts = [
        entities[start : start + 100] for start in range(0, len(entities), 100)
    ]  # MLflow's limit
    ask(uri, lambda client: [client.log_batch(run_id, params=part) for part in parts])
    return run_id


def find_run(uri: str, experiment_id: str, tags: Mapping[str, str]) -> RunFacts | None:
    """The newest run that has all these tags."""
    found = search(uri, experiment_id, tags, limit=1)
    return found[0] if found else None


def search(
    uri: str,
    experiment_id: str,
    tags: Mapping[str, str],
    *,
    exclude: Mapping[str, Sequence[str]] | None = None,
    prefix: Mapping[str, str] | None = None,
    limit: int | None = None,
    patience_s: float = 60.0,
) -> list[RunFacts]:
    """The runs that fulfil all conditions, the newest first. The only search for runs in hemoco.

    Args:
        uri: MLflow's URI.
        experiment_id: where to search.
        tags: values that a run's tags must have.
        exclude: values that a run's tags must not have; the run has these tags.
        prefix: how values of a run's tags must begin.
        limit: most runs to return; None: all.
        patience_s: how long a search that fails is tried again; 0: once.

    Raises:
        UsageError: a value cannot be searched for.
        TrackingError: MLflow does not answer.
    """
    exclude, prefix = exclude or {}, prefix or {}
    conditions = [(name, "=", value) for name, value in tags.items()]
    conditions += [(name, "!=", value) for name, values in exclude.items() for value in values]
    conditions += [(name, "LIKE", f"{value}%") for name, value in prefix.items()]
    for _, _, value in conditions:
        if '"' in value:
            raise UsageError(f'{value}: a name must not contain "')
    wanted = " and ".join(
        f'tags.`{name}` {operator} "{value}"' for name, operator, value in conditions
    )

    def begins_right(run: RunFacts) -> bool:
        # LIKE takes _ for any letter and ignores case
        return all(run.tags[name].startswith(value) for name, value in prefix.items())

    def search_pages(client: Any) -> list[RunFacts]:
        size = _PAGE if limit is None else min(limit, _PAGE)
        found, token = list[RunFacts](), None
        while True:
            page = client.search_runs(
                [experiment_id],
                wanted,
                max_results=size,
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            found += filter(begins_right, map(_facts, page))
            token = page.token
            if not token or (limit is not None and len(found) >= limit):
                return found[:limit]

    return ask(uri, search_pages, patience_s=patience_s)


def run_facts(uri: str, run_id: str) -> RunFacts:
    """A run by its id.

    Raises:
        TrackingError: MLflow does not know it.
    """
    return _facts(ask(uri, lambda client: client.get_run(run_id)))


def _facts(run: Any) -> RunFacts:
    """The facts of a run as MLflow's client returns it."""
    data, info = run.data, run.info
    points = data.to_proto().metrics  # the dictionary of metrics has neither steps nor times
    return RunFacts(
        run_id=info.run_id,
        status=info.status,
        started_s=info.start_time / 1000,
        ended_s=info.end_time / 1000 if info.end_time else None,
        measured_s=max((point.timestamp / 1000 for point in points), default=None),
        tags=dict(data.tags),
        params=dict(data.params),
        metrics=dict(data.metrics),
        steps={point.key: int(point.step) for point in points},
    )


def reopen_run(uri: str, run_id: str) -> None:
    """Marks a run as running again and takes the reason of its failure away."""
    ask(uri, lambda client: client.update_run(run_id, status="RUNNING"))
    if Tag.ERROR in run_facts(uri, run_id).tags:
        ask(uri, lambda client: client.delete_tag(run_id, Tag.ERROR))


def close_run(uri: str, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Ends a run."""
    ask(uri, lambda client: client.set_terminated(run_id, status))


def set_tags(uri: str, run_id: str, tags: dict[str, str]) -> None:
    """Sets or replaces tags."""
    ask(uri, lambda client: [client.set_tag(run_id, name, value) for name, value in tags.items()])


def log_artifact_bytes(uri: str, run_id: str, name: str, data: bytes) -> None:
    """Stores a file with the run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        ask(uri, lambda client: client.log_artifact(run_id, str(path)))


def read_artifacts(uri: str, run_id: str, suffix: str) -> dict[str, bytes]:
    """The run's files whose names end so, by name."""

    def read(client: Any) -> dict[str, bytes]:
        names = [item.path for item in client.list_artifacts(run_id) if item.path.endswith(suffix)]
        with tempfile.TemporaryDirectory() as folder:
            return {
                name: Path(client.download_artifacts(run_id, name, folder)).read_bytes()
                for name in names
            }

    return ask(uri, read)


def log_dataset_input(
    uri: str,
    run_id: str,
    name: str,
    url: str,
    digest: str,
    context: str,
    counts: dict[str, int] | None = None,
) -> None:
    """Records which data the run read; nothing of it is opened.

    Args:
        uri: of MLflow.
        run_id: the run.
        name: shown for the data.
        url: where it lies.
        digest: of its index; MLflow keeps the first `DIGEST_LENGTH` characters.
        context: what for, e.g. `pretraining`.
        counts: what is in it, by name.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = {"s3": "s3", "file": "local", "": "local"}.get(urlsplit(url).scheme, "code")
    source, profile = json.dumps({"uri": url}), json.dumps(counts) if counts else None
    data = Dataset(
        name=name, digest=digest[:DIGEST_LENGTH], source_type=kind, source=source, profile=profile
    )
    entry = DatasetInput(data, [InputTag("mlflow.data.context", context)])
    ask(uri, lambda client: client.log_inputs(run_id, datasets=[entry]))


def metric_points(uri: str, run_id: str, key: str) -> list[MetricPoint]:
    """One metric by step; of steps that a resumed training repeated, the later value."""
    points = ask(uri, lambda client: client.get_metric_history(run_id, key))
    by_step = {p.step: p for p in sorted(points, key=lambda p: int(p.timestamp))}
    return [
        MetricPoint(key=key, value=p.value, timestamp=int(p.timestamp), step=p.step)
        for _, p in sorted(by_step.items())
    ]


def metric_history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of `metric_points`."""
    return [(point.step, point.value) for point in metric_points(uri, run_id, key)]
