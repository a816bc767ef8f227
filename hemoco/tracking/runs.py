"""The door to MLflow: runs are opened, tagged, read and closed here, and metrics sent without blocking training.

mlflow is imported inside functions: it takes seconds, and `import hemoco` must not need it.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from hemoco.errors import TrackingError, UsageError
from hemoco.mlflow_uri import check_uri, database, shown
from hemoco.storage.objects import first_line, home
from hemoco.tracking.metric_queue import MetricQueue
from hemoco.tracking.unsent import MetricPoint, RefusedError

Answer = TypeVar("Answer")
EXPERIMENT = "hemoco"
DIGEST_LENGTH = 36
"""MLflow keeps so many characters of a data set's digest."""
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's pages open on evaluations of agents
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow's own 7 with back-off block for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
# asking again would give the same answer
_FINAL_ERRORS = (
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What MLflow knows of one run; metrics are the values of the highest step."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def tracking_uri() -> str:
    """`$MLFLOW_TRACKING_URI`, default SQLite below `home()`; absolute, because workers run in other folders."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
    return f"sqlite:///{database(uri).resolve()}" if uri.startswith("sqlite:///") else uri


def connect(uri: str) -> str:
    """Checks that MLflow answers, and finds or creates the experiment `hemoco`.

    Returns:
        The experiment's id.

    Raises:
        TrackingError: the URI is of a wrong kind, nothing answers there, or the experiment was deleted.
    """
    check_uri(uri)
    local = uri.startswith("sqlite:")
    patience_s = 30.0 if local else 0.0  # a file may be locked for a moment; a server that is not there stays away
    found = ask(uri, lambda client: client.get_experiment_by_name(EXPERIMENT), patience_s=patience_s)
    if found is None:
        folder = (database(uri).parent / "mlartifacts").as_uri() if local else None
        try:
            return str(ask(uri, lambda client: client.create_experiment(EXPERIMENT, folder, _KIND)))
        except TrackingError:
            # another process may have created it in between
            found = ask(uri, lambda client: client.get_experiment_by_name(EXPERIMENT))
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {EXPERIMENT!r} was deleted in MLflow at {shown(uri)}: restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    if "mlflow.experimentKind" not in found.tags:  # made by an older version
        with contextlib.suppress(TrackingError):  # who may only read sees it as it was
            tags = _KIND.items()
            ask(
                uri, lambda client: [client.set_experiment_tag(found.experiment_id, *tag) for tag in tags], patience_s=0
            )
    return str(found.experiment_id)


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


def reopen_run(uri: str, run_id: str) -> None:
    """Marks a run as running again and takes the reason of its failure away."""
    ask(uri, lambda client: client.update_run(run_id, status="RUNNING"))
    if "hemoco.error" in run_facts(uri, run_id).tags:
        ask(uri, lambda client: client.delete_tag(run_id, "hemoco.error"))


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


def ask(uri: str, question: Callable[[Any], Answer], *, patience_s: float = 60.0) -> Answer:
    """Asks MLflow, again and again for a while where that can help: server restarting, database locked.

    Args:
        uri: of MLflow.
        question: gets an MlflowClient.
        patience_s: after that time no new attempt begins.

    Raises:
        TrackingError: no answer in time, or a refusal (RefusedError).
    """
    client = _client_type()
    from mlflow.exceptions import MlflowException

    end = time.monotonic() + patience_s
    for pause_s in itertools.chain((0.2, 0.5, 1.0, 2.0, 4.0), itertools.repeat(8.0)):
        try:
            return question(client(tracking_uri=uri))
        except MlflowException as error:
            if error.error_code in _FINAL_ERRORS or time.monotonic() + pause_s > end:
                raise _refusal(uri, error) from error
        time.sleep(pause_s)
    raise AssertionError("endless")


class Tracker(MetricQueue):
    """Metrics of one MLflow run, sent while training goes on.

    Args:
        uri: of MLflow.
        run_id: the run.
        unsent: URL of a folder for points that are not delivered yet, `JOB/unsent_metrics/RUN_ID`: there a resumed
            training and `python -m jobs sync` find them.
    """

    def __init__(self, uri: str, run_id: str, unsent: str) -> None:
        _client_type()  # here, because two threads must not import mlflow at the same time
        self.step: int | None = None
        """The last one that was logged; None before."""
        super().__init__(partial(send_points, uri, run_id), unsent)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """As of MetricQueue."""
        self.step = step
        super().log(step, metrics)


def check_delivered(tracker: Tracker) -> None:
    """Refuses to call work done whose metrics MLflow does not have, for a comparison reads nothing else.

    Args:
        tracker: closed.

    Raises:
        TrackingError: it still has some.
    """
    if not tracker.delivered:
        raise TrackingError(
            "MLflow has not taken all metrics, which are kept beside the checkpoints: when it answers again, say the "
            "same words, and the work goes on from its last checkpoint"
        )


def send_points(uri: str, run_id: str, points: list[MetricPoint], *, patience_s: float = 0.0) -> None:
    """Sends at most 1000 points, however often they were sent before.

    Raises:
        RefusedError: MLflow would refuse them for ever.
        TrackingError: no answer in time.
    """
    from mlflow.entities import Metric

    metrics = [Metric(point.key, point.value, point.timestamp, point.step) for point in points]
    ask(uri, lambda client: client.log_batch(run_id, metrics=metrics), patience_s=patience_s)


def _client_type() -> Any:
    """MlflowClient, imported with our defaults in the environment; the user's own values win."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient


def _refusal(uri: str, error: Exception) -> TrackingError:
    reason = first_line(error)
    if "Max retries exceeded" in str(error) or "timed out" in str(error):
        reason = "it does not answer"
    advice = "start the server or correct MLFLOW_TRACKING_URI (unset: SQLite in $HEMOCO_HOME)"
    code = getattr(error, "error_code", "")
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    elif "'active' state" in reason:
        advice = "it was deleted, `mlflow runs restore --run-id` brings it back"
    kind = RefusedError if code in _FINAL_ERRORS else TrackingError
    return kind(f"MLflow at {shown(uri)}: {reason}; {advice}")
