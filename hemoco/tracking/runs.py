"""Runs in MLflow: opening, tagging, searching, reading and closing them, with their artifacts.

mlflow is imported inside functions: the import takes seconds, and `import hemoco` must not need it.
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
"""Characters that MLflow stores of a data set's digest."""
_PAGE = 500
"""Runs in one page of a search."""
_PARAMS_PER_CALL = 100
"""MLflow's limit for one call of log_batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One run in MLflow; times are in seconds since 1970."""

    run_id: str
    status: str
    """RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
    started_s: float
    """Time at which it was opened first."""
    ended_s: float | None
    """Time at which it last ended, also if it was reopened since; None if it never ended."""
    measured_s: float | None
    """Time of its newest metric; None if it has none."""
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    """Value at the highest step of each metric, by name."""
    steps: dict[str, int]
    """Highest step of each metric, by name."""

    @property
    def name(self) -> str:
        """Name in MLflow: `pretrain`, a transfer's name, or NAME@EPOCH for a curve's transfer."""
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
    """Opens a run and returns its id.

    Args:
        uri: URI of the tracking server.
        experiment_id: id of the experiment.
        name: name of the run in MLflow.
        parent: id of the parent run; None for a run without one.
        tags: tags that the run gets.
        params: params that the run gets.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    if parent:
        tags = tags | {"mlflow.parentRunId": parent}
    run = ask(uri, lambda client: client.create_run(experiment_id, run_name=name, tags=tags))
    run_id = str(run.info.run_id)
    from mlflow.entities import Param

    entities = [Param(key, value) for key, value in params.items()]

    def log_params(client: Any) -> None:
        for start in range(0, len(entities), _PARAMS_PER_CALL):
            client.log_batch(run_id, params=entities[start : start + _PARAMS_PER_CALL])

    ask(uri, log_params)
    return run_id


def find_run(uri: str, experiment_id: str, tags: Mapping[str, str]) -> RunFacts | None:
    """The newest run that has all these tags, or None."""
    runs = search(uri, experiment_id, tags, limit=1)
    return runs[0] if runs else None


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
    """The runs that meet all conditions, the newest first. The only search for runs in hemoco.

    Args:
        uri: URI of the tracking server.
        experiment_id: id of the experiment to search.
        tags: values that tags of a run must have.
        exclude: values that tags must not have. MLflow leaves out runs without the tag, too.
        prefix: texts with which the values of tags must begin.
        limit: most runs to return; None: all.
        patience_s: seconds for which a failing search is retried; 0: one attempt.

    Raises:
        UsageError: a value contains a quotation mark, which MLflow cannot search for.
        TrackingError: MLflow does not answer.
    """
    exclude = exclude or {}
    prefix = prefix or {}
    conditions = [(name, "=", value) for name, value in tags.items()]
    for name, values in exclude.items():
        conditions += [(name, "!=", value) for value in values]
    conditions += [(name, "LIKE", f"{value}%") for name, value in prefix.items()]
    for _, _, value in conditions:
        if '"' in value:
            raise UsageError(f'{value}: a name must not contain "')
    terms = [f'tags.`{name}` {operator} "{value}"' for name, operator, value in conditions]
    query = " and ".join(terms)

    def has_prefixes(run: RunFacts) -> bool:
        # LIKE is wider: it ignores case and reads _ as any character
        return all(run.tags[name].startswith(value) for name, value in prefix.items())

    def search_pages(client: Any) -> list[RunFacts]:
        size = _PAGE if limit is None else min(limit, _PAGE)
        runs: list[RunFacts] = []
        token = None
        while True:
            page = client.search_runs(
                [experiment_id],
                query,
                max_results=size,
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            runs += filter(has_prefixes, map(_facts, page))
            token = page.token
            if not token or (limit is not None and len(runs) >= limit):
                return runs[:limit]

    return ask(uri, search_pages, patience_s=patience_s)


def run_facts(uri: str, run_id: str) -> RunFacts:
    """Facts of a run, by its id.

    Raises:
        TrackingError: MLflow has no such run, or cannot be used.
    """
    return _facts(ask(uri, lambda client: client.get_run(run_id)))


def _facts(run: Any) -> RunFacts:
    """Facts of a run that MLflow's client has returned."""
    data, info = run.data, run.info
    # not data.metrics, which has neither steps nor times
    points = data.to_proto().metrics
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
    """Marks a run as running again, and removes the tag with the reason of its failure."""
    ask(uri, lambda client: client.update_run(run_id, status="RUNNING"))
    if Tag.ERROR in run_facts(uri, run_id).tags:
        ask(uri, lambda client: client.delete_tag(run_id, Tag.ERROR))


def close_run(uri: str, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Ends a run with a status."""
    ask(uri, lambda client: client.set_terminated(run_id, status))


def set_tags(uri: str, run_id: str, tags: dict[str, str], *, patience_s: float = 60.0) -> None:
    """Sets or replaces tags of a run; a failing call is retried for `patience_s` seconds."""

    def set_all(client: Any) -> None:
        for name, value in tags.items():
            client.set_tag(run_id, name, value)

    ask(uri, set_all, patience_s=patience_s)


def log_artifact_bytes(uri: str, run_id: str, name: str, data: bytes) -> None:
    """Stores data as an artifact of a run, under a file name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        ask(uri, lambda client: client.log_artifact(run_id, str(path)))


def read_artifacts(uri: str, run_id: str, suffix: str) -> dict[str, bytes]:
    """Artifacts of a run whose file names have a suffix, by file name."""

    def read(client: Any) -> dict[str, bytes]:
        names = [item.path for item in client.list_artifacts(run_id) if item.path.endswith(suffix)]
        artifacts = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                path = client.download_artifacts(run_id, name, folder)
                artifacts[name] = Path(path).read_bytes()
        return artifacts

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
    """Records a data set as an input of a run; the data are not opened.

    Args:
        uri: URI of the tracking server.
        run_id: id of the run.
        name: shown for the data.
        url: URL of the data.
        digest: digest of the shard index; MLflow stores the first `DIGEST_LENGTH` characters.
        context: use of the data, for example `pretraining`.
        counts: numbers of what is in it, by name.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = {"s3": "s3", "file": "local", "": "local"}.get(urlsplit(url).scheme, "code")
    source = json.dumps({"uri": url})
    profile = json.dumps(counts) if counts else None
    data = Dataset(
        name=name, digest=digest[:DIGEST_LENGTH], source_type=kind, source=source, profile=profile
    )
    entry = DatasetInput(data, [InputTag("mlflow.data.context", context)])
    ask(uri, lambda client: client.log_inputs(run_id, datasets=[entry]))


def metric_points(uri: str, run_id: str, key: str) -> list[MetricPoint]:
    """The points of one metric, one for each step, in the order of steps.

    A step that a resumed training repeated has several points; the latest counts.
    """
    history = ask(uri, lambda client: client.get_metric_history(run_id, key))
    latest: dict[int, MetricPoint] = {}
    for point in sorted(history, key=lambda point: int(point.timestamp)):
        latest[point.step] = MetricPoint(
            key=key, value=point.value, timestamp=int(point.timestamp), step=point.step
        )
    return [latest[step] for step in sorted(latest)]


def metric_history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Steps and values of one metric, from `metric_points`."""
    return [(point.step, point.value) for point in metric_points(uri, run_id, key)]
