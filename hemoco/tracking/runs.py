"""The door to MLflow: runs are opened, tagged, read and closed here, and metrics sent without blocking training.

mlflow is imported inside functions: it takes seconds, and `import hemoco` must not need it.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from hemoco.errors import UsageError
from hemoco.tracking.client import ask
from hemoco.tracking.tags import Tag
from hemoco.tracking.unsent import MetricPoint

DIGEST_LENGTH = 36
"""MLflow keeps so many characters of a data set's digest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What MLflow knows of one run; metrics are the values of the highest step."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def open_run(
    uri: str, experiment_id: str, *, name: str, parent: str | None, tags: dict[str, str], params: dict[str, str]
) -> str:
    """Starts a run, below a parent run if one is named, and returns its id."""
    tags = tags | ({"mlflow.parentRunId": parent} if parent else {})
    run_id = str(ask(uri, lambda client: client.create_run(experiment_id, run_name=name, tags=tags)).info.run_id)
    from mlflow.entities import Param

    entities = [Param(key, value) for key, value in params.items()]
    parts = [entities[start : start + 100] for start in range(0, len(entities), 100)]  # MLflow's limit
    ask(uri, lambda client: [client.log_batch(run_id, params=part) for part in parts])
    return run_id


def find_run(uri: str, experiment_id: str, tags: dict[str, str]) -> RunFacts | None:
    """The newest run that has all these tags."""
    found = find_runs(uri, experiment_id, tags)
    return found[0] if found else None


def find_runs(uri: str, experiment_id: str, tags: dict[str, str]) -> list[RunFacts]:
    """All runs that have all these tags, the newest first.

    Raises:
        UsageError: a value cannot be searched for.
    """
    for value in tags.values():
        if '"' in value:
            raise UsageError(f'{value}: a name must not contain "')
    wanted = " and ".join(f'tags.`{name}` = "{value}"' for name, value in tags.items())

    def search(client: Any) -> list[Any]:
        options = {"max_results": 500, "order_by": ["attributes.start_time DESC"]}
        pages = [client.search_runs([experiment_id], wanted, **options)]
        while pages[-1].token:
            pages.append(client.search_runs([experiment_id], wanted, page_token=pages[-1].token, **options))
        return [run for page in pages for run in page]

    return [facts_of(run) for run in ask(uri, search)]


def run_facts(uri: str, run_id: str) -> RunFacts:
    """A run by its id.

    Raises:
        TrackingError: MLflow does not know it.
    """
    return facts_of(ask(uri, lambda client: client.get_run(run_id)))


def facts_of(run: Any) -> RunFacts:
    """What a run that MLflow's client has given says."""
    data = run.data
    return RunFacts(
        run_id=run.info.run_id,
        status=run.info.status,
        tags=dict(data.tags),
        params=dict(data.params),
        metrics=dict(data.metrics),
    )


def metric_steps(run: Any) -> dict[str, int]:
    """The newest step of each metric of a run that MLflow's client has given."""
    # `run.data.metrics` has no steps
    return {point.key: int(point.step) for point in run.data.to_proto().metrics}


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
            return {name: Path(client.download_artifacts(run_id, name, folder)).read_bytes() for name in names}

    return ask(uri, read)


def log_dataset_input(
    uri: str, run_id: str, name: str, url: str, digest: str, context: str, counts: dict[str, int] | None = None
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
    data = Dataset(name=name, digest=digest[:DIGEST_LENGTH], source_type=kind, source=source, profile=profile)
    entry = DatasetInput(data, [InputTag("mlflow.data.context", context)])
    ask(uri, lambda client: client.log_inputs(run_id, datasets=[entry]))


def metric_points(uri: str, run_id: str, key: str) -> list[MetricPoint]:
    """One metric by step; of steps that a resumed training repeated, the later value."""
    points = ask(uri, lambda client: client.get_metric_history(run_id, key))
    by_step = {p.step: p for p in sorted(points, key=lambda p: int(p.timestamp))}
    return [
        MetricPoint(key=key, value=p.value, timestamp=int(p.timestamp), step=p.step) for _, p in sorted(by_step.items())
    ]


def metric_history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of `metric_points`."""
    return [(point.step, point.value) for point in metric_points(uri, run_id, key)]
