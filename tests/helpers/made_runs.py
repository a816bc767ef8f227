"""Runs as the pipeline records them, written to MLflow with a test's settings, values and times."""

import dataclasses
from collections.abc import Mapping

from mlflow.entities import Param

from hemoco.config import AnyTransferConfig, Recipe, flat_params
from hemoco.config.kinds import method_name, transfer_kind
from hemoco.tracking.client import ask, connect
from hemoco.tracking.metric_queue import send_points
from hemoco.tracking.runs import close_run, open_run, set_tags
from hemoco.tracking.tags import Tag
from hemoco.tracking.unsent import MetricPoint

Values = Mapping[tuple[str, int], float]
"""Values by init and seed."""
START_S = 1_700_000_000
"""Start of a made pretraining, in seconds since 1970."""


@dataclasses.dataclass(frozen=True)
class MadeRun:
    """A run whose pretraining has just begun."""

    uri: str
    name: str
    recipe: Recipe
    parent: str
    pretraining: str


def begin_run(uri: str, name: str, recipe: Recipe, *, digest: str = "d1") -> MadeRun:
    """Writes the parent run and the pretraining's run, which began at START_S."""
    tags = {"hemoco.run": name, "hemoco.recipe": recipe.name}
    of_parent = tags | {"hemoco.phase": "parent"}
    params = flat_params(recipe)
    parent = open_run(uri, connect(uri), name=name, parent=None, tags=of_parent, params=params)
    tags |= {"hemoco.phase": "pretrain", "hemoco.data_digest": digest}
    tags[Tag.METHOD] = method_name(recipe.pretrain.moco)
    tags |= {"mlflow.parentRunId": parent}
    began = {"start_time": START_S * 1000, "tags": tags, "run_name": "pretrain"}
    run_id = ask(uri, lambda client: client.create_run(connect(uri), **began)).info.run_id
    settings = [
        Param(key, value) for key, value in flat_params({"pretrain": recipe.pretrain}).items()
    ]
    ask(uri, lambda client: client.log_batch(run_id, params=settings))
    return MadeRun(uri, name, recipe, parent, run_id)


def log_rate(run: MadeRun, *, step: int, at_s: float, images_per_s: float) -> None:
    """Writes a record of the pretraining, some seconds after START_S."""
    timestamp = int((START_S + at_s) * 1000)
    values = {"loss": 3.0, "images_per_s": images_per_s, "knn_top1": 0.5}
    points = [
        MetricPoint(key=key, value=value, timestamp=timestamp, step=step)
        for key, value in values.items()
    ]
    send_points(run.uri, run.pretraining, points)


def write_transfer(
    run: MadeRun,
    name: str,
    values: Values,
    *,
    epoch: int | None = None,
    labelled: int = 0,
    error: str = "",
    open_: int = 0,
) -> str:
    """Writes a transfer that measured these values; returns the id of its MLflow run.

    Args:
        run: the run of the transfer.
        name: name of the transfer in its recipe.
        values: values of the units that are done.
        epoch: epoch of the backbone, for a point of the curve.
        labelled: labelled images, for a low-shot transfer.
        error: reason of its failure.
        open_: a seed; the transfer is running, and a unit of this seed is not done.
    """
    config: AnyTransferConfig = run.recipe.transfers[name]
    tags = {
        "hemoco.run": run.name,
        "hemoco.transfer": name,
        "hemoco.metric": "top1",
        "hemoco.transfer_data_digest": "t1",
        Tag.TRANSFER_KIND: transfer_kind(config),
    }
    tags |= (
        {"hemoco.phase": "transfer"}
        if epoch is None
        else {"hemoco.phase": "curve", "hemoco.epoch": str(epoch)}
    )
    tags |= {f"hemoco.done/{init}/seed_{seed}": "true" for init, seed in values}
    params = flat_params({f"transfers.{name}": config})
    run_id = open_run(
        run.uri, connect(run.uri), name=name, parent=run.parent, tags=tags, params=params
    )
    metrics = {f"{init}/seed_{seed}/top1": value for (init, seed), value in values.items()}
    metrics |= {
        key.replace("/top1", "/labelled_images"): float(labelled)
        for key in list(metrics)
        if labelled
    }
    send_points(
        run.uri,
        run_id,
        [MetricPoint(key=k, value=v, timestamp=1, step=0) for k, v in metrics.items()],
    )
    if error:
        set_tags(run.uri, run_id, {"hemoco.error": error})
    if open_:
        point = MetricPoint(key=f"pretrained/seed_{open_}/top1", value=0.01, timestamp=1, step=0)
        send_points(run.uri, run_id, [point])
    else:
        close_run(run.uri, run_id, "FAILED" if error else "FINISHED")
    return run_id


def end_pretraining(run: MadeRun, *, at_s: float) -> None:
    """Ends the pretraining some seconds after START_S."""
    end = int((START_S + at_s) * 1000)
    ask(run.uri, lambda client: client.set_terminated(run.pretraining, "FINISHED", end_time=end))


def log_curve(run: MadeRun, name: str, values: Mapping[int, float]) -> None:
    """Writes a metric of the pretraining by step, one step a second."""
    points = [
        MetricPoint(key=name, value=v, timestamp=(START_S + s) * 1000, step=s)
        for s, v in values.items()
    ]
    for start in range(0, len(points), 1000):
        send_points(run.uri, run.pretraining, points[start : start + 1000])
