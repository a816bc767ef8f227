"""The results of one run: its pretraining and what its transfers measured, read from MLflow alone.

A value counts only if its unit, one init and one seed of a transfer, is recorded as done by the tag
`hemoco.done/INIT/seed_N` of the transfer's run. A unit that is still training logs metrics under
the same names.
"""

import ast
import contextlib
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from hemoco.errors import RefusedError, UsageError
from hemoco.results.kinds import kind_of
from hemoco.tracking.client import connect
from hemoco.tracking.runs import RunFacts, run_facts, search
from hemoco.tracking.tags import Tag

PRETRAINED = "pretrained"
"""The init that stands for the pretrained backbone; all others are its baselines."""
_VALUE = re.compile(r"(?P<init>[^/]+)/seed_(?P<seed>\d+)/(?P<metric>.+)")
_TRANSFER_SEEDS = re.compile(r"transfers\.(.+)\.seeds")  # a setting that every transfer has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The training that made the backbone; unknown numbers are nan, unknown strings empty."""

    run: str
    """Name of the run."""
    run_id: str
    """MLflow's id of the pretraining's run."""
    status: str
    backbone_url: str
    recipe: str
    data_digest: str
    loss: float
    chance_loss: float
    """Loss of constant embeddings, ln(K + 1) for a queue of length K."""
    embedding_std: float
    """Standard deviation of the normalised embeddings times sqrt(C), for C dimensions."""
    knn_top1: float
    """Accuracy of the last kNN evaluation during pretraining."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The headline metric of one transfer from one backbone with one seed."""

    transfer: str
    metric: str
    init: str
    seed: int
    value: float
    run_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A transfer that did not finish, and the reason."""

    transfer: str
    reason: str
    run_id: str
    """MLflow's id of the transfer's run; empty if it has not begun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResults:
    """A pretraining and what its transfers measured."""

    pretraining: Pretraining
    rows: tuple[Row, ...]
    """Sorted by transfer (in the recipe's order), init and seed."""
    failed: tuple[Failure, ...]
    unfinished: tuple[Failure, ...] = ()
    """Transfers that are running, were left by a process that is gone, or have not begun."""


class Records(NamedTuple):
    """The MLflow runs of one run; where one was repeated, the newest."""

    run: str
    parent: RunFacts
    pretraining: RunFacts | None
    """None if MLflow does not have it: the backbone came from elsewhere."""
    transfers: list[RunFacts]
    """In the order of the recipe."""
    curve: list[RunFacts]
    """Transfers of backbones exported during the pretraining, one for each transfer and epoch."""


def run_results(uri: str, run: str) -> RunResults:
    """Returns what MLflow has recorded of a run so far.

    Raises:
        UsageError: MLflow has no run of this name.
        TrackingError: MLflow cannot be used.
    """
    return results_of(read_records(uri, run))


def read_records(uri: str, run: str) -> Records:
    """Returns all MLflow runs of a run; the errors are those of `run_results`."""
    experiment_id = connect(uri)
    newest_first = search(uri, experiment_id, {Tag.RUN: run})
    phases: dict[str, list[RunFacts]] = {"parent": [], "pretrain": [], "transfer": [], "curve": []}
    for facts in reversed(newest_first):
        phases[facts.tags[Tag.PHASE]].append(facts)
    if not phases["parent"]:
        raise UsageError(unknown_run(run, search(uri, experiment_id, {Tag.PHASE: "parent"})))
    parent = phases["parent"][-1]
    newest = {facts.tags[Tag.TRANSFER]: facts for facts in phases["transfer"]}
    # Transfers run in parallel: the order in which MLflow saw them begin varies from run to run.
    in_order = dict.fromkeys([*transfer_names(parent), *newest])
    transfers = [newest[name] for name in in_order if name in newest]
    curve = {(facts.tags[Tag.TRANSFER], facts.tags[Tag.EPOCH]): facts for facts in phases["curve"]}
    source = parent.tags.get(Tag.PRETRAIN_RUN_ID)
    if source is not None:
        # The backbone is that of another run, which this MLflow need not have.
        with contextlib.suppress(RefusedError):
            phases["pretrain"].append(run_facts(uri, source))
    pretraining = phases["pretrain"][-1] if phases["pretrain"] else None
    return Records(run, parent, pretraining, transfers, list(curve.values()))


def transfer_names(parent: RunFacts) -> list[str]:
    """Returns the names of a run's transfers in the order of its recipe.

    Args:
        parent: the parent run in MLflow.
    """
    recorded = parent.tags.get(Tag.TRANSFERS)
    if recorded is not None:
        return list(json.loads(recorded))
    # Versions before this tag recorded the settings alone. MLflow's SQL stores return params in the
    # order in which they were logged, without promising it.
    matches = map(_TRANSFER_SEEDS.fullmatch, parent.params)
    return [match[1] for match in matches if match]


def results_of(records: Records) -> RunResults:
    """Returns the results in a run's records."""
    rows: list[Row] = []
    failed = []
    for facts in records.transfers:
        rows += done_rows(facts)
        if facts.status in ("FAILED", "KILLED"):
            failed.append(_failure(facts, facts.tags.get(Tag.ERROR, "no reason was recorded")))
    return RunResults(
        pretraining=_pretraining(records),
        rows=tuple(rows),
        failed=tuple(failed),
        unfinished=tuple(_unfinished(records)),
    )


def _unfinished(records: Records) -> Iterator[Failure]:
    for facts in records.transfers:
        if facts.status not in ("FAILED", "KILLED", "FINISHED"):
            yield _failure(facts, _progress(facts))
    begun = {facts.tags[Tag.TRANSFER] for facts in records.transfers}
    for name in transfer_names(records.parent):
        if name not in begun:
            yield Failure(transfer=name, reason="not begun", run_id="")


def _progress(facts: RunFacts) -> str:
    """Returns how many units of a transfer are done, for example "3 of 4 measured"."""
    done = sum(tag.startswith(Tag.DONE_PREFIX) for tag in facts.tags)
    prefix = f"transfers.{facts.tags[Tag.TRANSFER]}"
    inits = facts.params.get(f"{prefix}.inits")
    seeds = facts.params.get(f"{prefix}.seeds")
    if inits is None or seeds is None:
        return f"{done} measured"
    units = len(ast.literal_eval(inits)) * len(ast.literal_eval(seeds))
    return f"{done} of {units} measured"


def _failure(facts: RunFacts, reason: str) -> Failure:
    return Failure(transfer=facts.tags[Tag.TRANSFER], reason=reason, run_id=facts.run_id)


def _pretraining(records: Records) -> Pretraining:
    parent, facts = records.parent, records.pretraining
    tags = parent.tags | (facts.tags if facts else {})
    metrics = facts.metrics if facts else {}
    chance_loss = math.nan
    if facts is not None and kind_of(facts) in ("moco_v1", "moco_v2"):
        chance_loss = math.log(int(facts.params["pretrain.moco.queue_length"]) + 1)
    return Pretraining(
        run=records.run,
        run_id=facts.run_id if facts else tags.get(Tag.PRETRAIN_RUN_ID, ""),
        status=facts.status if facts else "",
        backbone_url=parent.tags.get(Tag.BACKBONE_URL) or tags.get(Tag.BACKBONE_URL, ""),
        recipe=tags.get(Tag.RECIPE, ""),
        data_digest=tags.get(Tag.DATA_DIGEST, ""),
        loss=metrics.get("loss", math.nan),
        chance_loss=chance_loss,
        embedding_std=metrics.get("embedding_std", math.nan),
        knn_top1=metrics.get("knn_top1", math.nan),
    )


def done_rows(facts: RunFacts) -> list[Row]:
    """Returns the headline values of a transfer's run, of the units that are recorded as done."""
    return done_values(facts, facts.tags[Tag.METRIC])


def done_values(facts: RunFacts, metric: str) -> list[Row]:
    """Returns the values of one metric of a transfer's run, of the units recorded as done."""
    rows = []
    for key, value in facts.metrics.items():
        match = _VALUE.fullmatch(key)
        if match is None or match["metric"] != metric:
            continue
        init, seed = match["init"], match["seed"]
        if f"{Tag.DONE_PREFIX}{init}/seed_{seed}" not in facts.tags:
            continue
        row = Row(
            transfer=facts.tags[Tag.TRANSFER],
            metric=metric,
            init=init,
            seed=int(seed),
            value=value,
            run_id=facts.run_id,
        )
        rows.append(row)
    return sorted(rows, key=lambda row: (row.init, row.seed))


def unknown_run(run: str, parents: list[RunFacts]) -> str:
    """Returns the message for a name that MLflow does not have, with the names nearest to it.

    Args:
        run: the name.
        parents: the parent runs of all runs.
    """
    names = list(dict.fromkeys(facts.tags[Tag.RUN] for facts in parents))
    if not names:
        return (
            f"run {run!r} is not in MLflow, which has none: "
            "begin one with `python -m jobs run RECIPE`"
        )
    shown = difflib.get_close_matches(run, names, n=3) or names[:10]
    return f"run {run!r} is not in MLflow; there are {len(names)}, among them {', '.join(shown)}"
