"""What a run came to: its pretraining and the results of its transfers, read from MLflow and nowhere else.

A value counts if its unit, one init and one seed of a transfer, is recorded as done: the tag `hemoco.done/INIT/seed_N`
of the transfer's run. What a training logs on its way has the same name.
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
"""The init that all others are baselines of."""
_VALUE = re.compile(r"(?P<init>[^/]+)/seed_(?P<seed>\d+)/(?P<metric>.+)")
_TRANSFER_SEEDS = re.compile(r"transfers\.(.+)\.seeds")  # a setting that every transfer has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The training that made the backbone; unknown numbers are nan, unknown strings empty."""

    run: str
    """Name of the run."""
    run_id: str
    """Of the pretraining in MLflow."""
    status: str
    backbone_url: str
    recipe: str
    data_digest: str
    loss: float
    chance_loss: float
    """ln(K + 1), the loss of constant embeddings."""
    embedding_std: float
    """Times sqrt(C)."""
    knn_top1: float
    """Measured during pretraining."""


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
    """A transfer that did not finish, and why."""

    transfer: str
    reason: str
    run_id: str
    """Empty where it has not begun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResults:
    """A pretraining and what its transfers measured."""

    pretraining: Pretraining
    rows: tuple[Row, ...]
    failed: tuple[Failure, ...]
    unfinished: tuple[Failure, ...] = ()
    """Transfers that are running, were left by a process that is gone, or have not begun."""


class Records(NamedTuple):
    """The MLflow runs of one run; of repeated ones the newest."""

    run: str
    parent: RunFacts
    pretraining: RunFacts | None
    """None where MLflow does not know it: the backbone came from elsewhere."""
    transfers: list[RunFacts]
    curve: list[RunFacts]
    """Transfers of backbones exported during the pretraining, one for each transfer and epoch."""


def run_results(uri: str, run: str) -> RunResults:
    """What MLflow has recorded of a run so far.

    Raises:
        UsageError: MLflow knows no run of this name.
        TrackingError: MLflow cannot be used.
    """
    return results_of(read_records(uri, run))


def read_records(uri: str, run: str) -> Records:
    """What MLflow has of a run; the same errors as `run_results`."""
    experiment_id = connect(uri)
    found = search(uri, experiment_id, {Tag.RUN: run})
    phases: dict[str, list[RunFacts]] = {"parent": [], "pretrain": [], "transfer": [], "curve": []}
    for facts in reversed(found):  # the oldest first
        phases[facts.tags[Tag.PHASE]].append(facts)
    if not phases["parent"]:
        raise UsageError(unknown_run(run, search(uri, experiment_id, {Tag.PHASE: "parent"})))
    parent = phases["parent"][-1]
    newest = {facts.tags[Tag.TRANSFER]: facts for facts in phases["transfer"]}
    # Transfers run in parallel, so the order in which MLflow saw them begin changes from run to run.
    known_order = [name for name in transfer_names(parent) if name in newest]
    transfers = [newest[name] for name in dict.fromkeys([*known_order, *newest])]
    curve = {(facts.tags[Tag.TRANSFER], facts.tags[Tag.EPOCH]): facts for facts in phases["curve"]}
    source = parent.tags.get(Tag.PRETRAIN_RUN_ID)
    if source is not None:  # the backbone is another run's, which this MLflow need not know
        with contextlib.suppress(RefusedError):
            phases["pretrain"].append(run_facts(uri, source))
    pretraining = next(reversed(phases["pretrain"]), None)
    return Records(run, parent, pretraining, transfers, list(curve.values()))


def transfer_names(parent: RunFacts) -> list[str]:
    """Names of a run's transfers, in the order of its recipe, from the facts of its parent run."""
    recorded = parent.tags.get(Tag.TRANSFERS)
    if recorded is not None:
        return list(json.loads(recorded))
    # Versions before this tag recorded the settings alone. MLflow's SQL stores return params in the
    # order in which they were logged, without promising it.
    matches = map(_TRANSFER_SEEDS.fullmatch, parent.params)
    return [match[1] for match in matches if match]


def results_of(records: Records) -> RunResults:
    """The results in a run's records."""
    rows = [row for facts in records.transfers for row in done_rows(facts)]
    ended = [facts for facts in records.transfers if facts.status in ("FAILED", "KILLED")]
    return RunResults(
        pretraining=_pretraining(records),
        rows=tuple(rows),
        failed=tuple(
            _failure(facts, facts.tags.get(Tag.ERROR, "no reason was recorded")) for facts in ended
        ),
        unfinished=tuple(_unfinished(records)),
    )


def _unfinished(records: Records) -> Iterator[Failure]:
    for facts in records.transfers:
        if facts.status not in ("FAILED", "KILLED", "FINISHED"):
            yield _failure(facts, _measured(facts))
    begun = {facts.tags[Tag.TRANSFER] for facts in records.transfers}
    for name in transfer_names(records.parent):
        if name not in begun:
            yield Failure(transfer=name, reason="not begun", run_id="")


def _measured(facts: RunFacts) -> str:
    """How much of a transfer is done."""
    done = sum(tag.startswith(Tag.DONE_PREFIX) for tag in facts.tags)
    name = f"transfers.{facts.tags[Tag.TRANSFER]}"
    inits, seeds = (facts.params.get(f"{name}.{field}") for field in ("inits", "seeds"))
    if inits is None or seeds is None:
        return f"{done} measured"
    return f"{done} of {len(ast.literal_eval(inits)) * len(ast.literal_eval(seeds))} measured"


def _failure(facts: RunFacts, reason: str) -> Failure:
    return Failure(transfer=facts.tags[Tag.TRANSFER], reason=reason, run_id=facts.run_id)


def _pretraining(records: Records) -> Pretraining:
    parent, facts = records.parent, records.pretraining
    tags = parent.tags | (facts.tags if facts else {})
    metrics = facts.metrics if facts else {}
    has_queue = facts is not None and kind_of(facts) in ("moco_v1", "moco_v2")
    return Pretraining(
        run=records.run,
        run_id=facts.run_id if facts else tags.get(Tag.PRETRAIN_RUN_ID, ""),
        status=facts.status if facts else "",
        backbone_url=parent.tags.get(Tag.BACKBONE_URL) or tags.get(Tag.BACKBONE_URL, ""),
        recipe=tags.get(Tag.RECIPE, ""),
        data_digest=tags.get(Tag.DATA_DIGEST, ""),
        loss=metrics.get("loss", math.nan),
        chance_loss=math.log(int(facts.params["pretrain.moco.queue_length"]) + 1)
        if facts and has_queue
        else math.nan,
        embedding_std=metrics.get("embedding_std", math.nan),
        knn_top1=metrics.get("knn_top1", math.nan),
    )


def done_rows(facts: RunFacts) -> list[Row]:
    """The headline values of a transfer's run that are recorded as done."""
    return done_values(facts, facts.tags[Tag.METRIC])


def done_values(facts: RunFacts, metric: str) -> list[Row]:
    """The values of one metric of a transfer's run, of the units that are recorded as done."""
    rows = []
    for key, value in facts.metrics.items():
        match = _VALUE.fullmatch(key)
        done = (
            match is not None
            and f"{Tag.DONE_PREFIX}{match['init']}/seed_{match['seed']}" in facts.tags
        )
        if match and done and match["metric"] == metric:
            row = Row(
                transfer=facts.tags[Tag.TRANSFER],
                metric=match["metric"],
                init=match["init"],
                seed=int(match["seed"]),
                value=value,
                run_id=facts.run_id,
            )
            rows.append(row)
    return sorted(rows, key=lambda row: (row.init, row.seed))


def unknown_run(run: str, parents: list[RunFacts]) -> str:
    """What to say of a name that MLflow does not know; `parents` are those of all runs."""
    names = list(dict.fromkeys(facts.tags[Tag.RUN] for facts in parents))
    if not names:
        return f"run {run!r} is not in MLflow, which has none: begin one with `python -m jobs run RECIPE`"
    shown = difflib.get_close_matches(run, names, n=3) or names[:10]
    return f"run {run!r} is not in MLflow; there are {len(names)}, among them {', '.join(shown)}"
