"""Opening a run by its name: its checks, its parent run in MLflow and the child runs below it."""

import dataclasses
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from hemoco.config import (
    Recipe,
    config_difference,
    flat_params,
)
from hemoco.data.shards.index import ShardIndex, ShardIndexes
from hemoco.errors import TrackingError, UsageError, first_line
from hemoco.names import check_run_name
from hemoco.storage.objects import join_url
from hemoco.tracking import client
from hemoco.tracking import runs as tracking
from hemoco.tracking.client import shown
from hemoco.tracking.tags import Tag
from pipeline.checks import check_urls
from pipeline.run_folder import check_run_folder, mark_run_folder, remove_run_folder, saved_names

logger = logging.getLogger(__name__)

_IDENTITY = (Tag.RUN, Tag.PHASE, Tag.TRANSFER, Tag.EPOCH)
"""Tags that identify a child run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """An opened run: its recipe, its parent run in MLflow, its folder, its data."""

    recipe: Recipe
    run: str
    uri: str
    experiment_id: str
    parent_id: str
    url: str
    indexes: ShardIndexes
    """Indexes of all shards that the run reads."""
    data: ShardIndex
    """Index of the pretraining's data."""
    stopping: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set when the whole run is to stop, for example by Ctrl-C."""


class Origin(NamedTuple):
    """The backbone that transfers start from."""

    backbone_url: str
    run_id: str
    """MLflow's id of its pretraining."""


def open_study(
    recipe: Recipe,
    *,
    indexes: ShardIndexes,
    run: str,
    storage: str,
    fresh: bool,
    tags: dict[str, str],
) -> Study:
    """Finds the run by its name, or opens a new one, and sets the tags on its parent run.

    The arguments are those of `pipeline.run.pretrain_then_transfer`.

    Raises:
        UsageError: the recipe has a path instead of a URL; the name belongs to a run with other
            settings (the message shows the difference) or with its checkpoints elsewhere; the run's
            folder has content but MLflow does not have the run; or, with `fresh`, the folder is not
            this run's.
    """
    check_run_name("run", run)
    check_urls(recipe)
    data = indexes.at(recipe.data.shards)
    uri = client.tracking_uri()
    experiment_id = client.connect(uri)
    params = flat_params(recipe)
    known = None
    if not fresh:
        known = tracking.find_run(uri, experiment_id, {Tag.RUN: run, Tag.PHASE: "parent"})
    url = join_url(storage, run)
    if known is None:
        if fresh:
            # A refusal must leave MLflow and the folder as they are, so the check comes first.
            check_run_folder(url, run)
            _supersede(uri, experiment_id, run)
            remove_run_folder(url, run)
        elif saved_names(url):
            # The message below advises --fresh, which would refuse a folder of something else.
            check_run_folder(url, run)
            raise UsageError(
                f"{url} has what a run of this name saved, but MLflow at {shown(uri)} does not "
                "have this run: set MLFLOW_TRACKING_URI to the one that has it, choose another "
                "--run name, or --fresh to remove it"
            )
        parent_id = tracking.open_run(
            uri,
            experiment_id,
            name=run,
            parent=None,
            tags={Tag.RUN: run, Tag.PHASE: "parent", Tag.RECIPE: recipe.name},
            params=params,
        )
    else:
        parent_id = known.run_id
        difference = config_difference(known.params, params)
        if difference:
            raise UsageError(
                f"run {run!r} exists with other settings ({'; '.join(difference[:5])}): "
                "choose another --run name, or --fresh to start it anew"
            )
        url = same_folder(known, run, url)
        if known.status != "FINISHED":
            tracking.reopen_run(uri, parent_id)
    if known is None or known.status != "FINISHED":
        # the command's tags are those of the last code that worked on the run; `status` and `sync`
        # find its folder by STORAGE, and results are shown in the order of TRANSFERS
        recorded = {Tag.STORAGE: url, Tag.TRANSFERS: json.dumps(list(recipe.transfers))}
        tracking.set_tags(uri, parent_id, tags | recorded)
        mark_run_folder(url, run)
    return Study(
        recipe=recipe,
        run=run,
        uri=uri,
        experiment_id=experiment_id,
        parent_id=parent_id,
        url=url,
        indexes=indexes,
        data=data,
    )


def same_folder(known: tracking.RunFacts, run: str, url: str) -> str:
    """Returns the folder in which a known run has its checkpoints.

    Raises:
        UsageError: the run is unfinished and its folder is not `url`; it would start anew there.
    """
    before = known.tags.get(Tag.STORAGE, url)
    if before != url and known.status != "FINISHED":
        root = before.removesuffix("/" + run)
        raise UsageError(
            f"run {run!r} has its checkpoints at {before}: use --storage {root} to resume it, "
            "choose another --run name, or --fresh to start it anew"
        )
    return before


def open_child(
    study: Study, name: str, tags: dict[str, str]
) -> tuple[str, tracking.RunFacts | None]:
    """Opens a child run, or reopens an unfinished one with the same identity.

    Args:
        study: the run.
        name: "pretrain", or the name of a transfer.
        tags: tags of the child run; those in `_IDENTITY` are searched for.

    Returns:
        The id of the child run, and its facts if it is finished already.
    """
    key = {tag: tags[tag] for tag in _IDENTITY if tag in tags}
    known = tracking.find_run(study.uri, study.experiment_id, key)
    if known is not None and known.status == "FINISHED":
        return known.run_id, known
    if known is not None:
        tracking.reopen_run(study.uri, known.run_id)
        return known.run_id, None
    config: Any
    if Tag.TRANSFER in tags:
        prefix, config = f"transfers.{name}", study.recipe.transfers[name]
    else:
        prefix, config = "pretrain", study.recipe.pretrain
    run_id = tracking.open_run(
        study.uri,
        study.experiment_id,
        name=f"{name}@{tags[Tag.EPOCH]}" if Tag.EPOCH in tags else name,
        parent=study.parent_id,
        tags=tags,
        params=flat_params({prefix: config}),
    )
    return run_id, None


@contextmanager
def closing_run(uri: str, run_id: str, stopping: threading.Event) -> Iterator[None]:
    """Ends an MLflow run when the block ends: FINISHED, FAILED, or KILLED if the run is stopping.

    The reason of a failure is recorded in the tag `hemoco.error`.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            stopping.set()
        reason = "interrupted" if stopping.is_set() else first_line(error)
        try:
            tracking.set_tags(uri, run_id, {Tag.ERROR: reason})
            tracking.close_run(uri, run_id, "KILLED" if stopping.is_set() else "FAILED")
        except TrackingError as tracking_error:
            # must not replace the error that ended the block
            logger.warning("event=run_left_open run_id=%s %s", run_id, tracking_error)
        raise
    tracking.close_run(uri, run_id, "FINISHED")


def _supersede(uri: str, experiment_id: str, run: str) -> None:
    """Renames earlier runs of this name in MLflow, where they stay."""
    while (old := tracking.find_run(uri, experiment_id, {Tag.RUN: run})) is not None:
        tracking.set_tags(uri, old.run_id, {Tag.RUN: f"{run} (superseded)"})
