"""What a run came to: its pretraining and the results of its transfers, read from MLflow and nowhere else."""

import csv
import dataclasses
import difflib
import io
import json
import math
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hemoco.errors import UsageError
from hemoco.tracking import RunFacts, connect, find_runs, metric_history, read_artifacts

if TYPE_CHECKING:
    from rich.table import Table

_INITS = ("pretrained", "random")
_CURVES = ("loss", "embedding_std", "knn_top1")
_VALUE = re.compile(r"(?P<init>[^/]+)/seed_(?P<seed>\d+)/(?P<metric>.+)")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A pretraining and what its transfers measured."""

    pretraining: Pretraining
    rows: tuple[Row, ...]
    failed: tuple[Failure, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """One transfer: means over its seeds, nan where an init was not measured."""

    transfer: str
    metric: str
    pretrained: float
    random: float
    seeds: int

    @property
    def difference(self) -> float:
        """Pretrained minus random."""
        return self.pretrained - self.random


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferImage:
    """A PNG that a transfer recorded."""

    transfer: str
    name: str
    png: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that a report shows."""

    comparison: Comparison
    params: dict[str, str]
    """Every setting by its dotted name; those of `pretrain` are the ones the backbone was trained with."""
    curves: dict[str, list[tuple[int, float]]]
    """(step, value) of the pretraining's loss, embedding_std and knn_top1; empty where not recorded."""
    images: tuple[TransferImage, ...]


class _Records(NamedTuple):
    run: str
    parent: RunFacts
    pretraining: RunFacts | None
    transfers: list[RunFacts]


def comparison(uri: str, run: str) -> Comparison:
    """What MLflow has recorded of a run so far.

    Raises:
        UsageError: MLflow knows no run of this name.
        TrackingError: MLflow cannot be used.
    """
    return _compare(_read_records(uri, run))


def collect_report(uri: str, run: str) -> ReportData:
    """The comparison with the settings, curves and images of its runs.

    Raises:
        UsageError: MLflow knows no run of this name.
        TrackingError: MLflow cannot be used.
    """
    records = _read_records(uri, run)
    source = records.pretraining
    images = [
        TransferImage(transfer=facts.tags["hemoco.transfer"], name=name.removesuffix(".png"), png=png)
        for facts in records.transfers
        for name, png in sorted(read_artifacts(uri, facts.run_id, ".png").items())
    ]
    return ReportData(
        comparison=_compare(records),
        params=records.parent.params | (source.params if source else {}),
        curves={name: metric_history(uri, source.run_id, name) if source else [] for name in _CURVES},
        images=tuple(images),
    )


def summaries(found: Comparison) -> list[Summary]:
    """One line per transfer, in the order of the rows."""
    lines = []
    for transfer, metric in dict.fromkeys((row.transfer, row.metric) for row in found.rows):
        rows = [row for row in found.rows if row.transfer == transfer]
        values = {init: [row.value for row in rows if row.init == init] for init in _INITS}
        means = {init: statistics.fmean(values[init] or [math.nan]) for init in _INITS}
        seeds = len({row.seed for row in rows})
        lines.append(Summary(transfer=transfer, metric=metric, seeds=seeds, **means))
    return lines


def to_json(found: Comparison) -> str:
    """Keys `pretraining` and `rows`; numbers that are unknown or not finite are null."""

    def known(facts: dict[str, Any]) -> dict[str, Any]:
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in facts.items()}

    rows = [known(dataclasses.asdict(row)) for row in found.rows]
    return json.dumps({"pretraining": known(dataclasses.asdict(found.pretraining)), "rows": rows}, indent=2) + "\n"


def to_csv(found: Comparison) -> str:
    """One line per row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in found.rows)
    return text.getvalue()


def to_markdown(found: Comparison) -> str:
    """One line per transfer: means over the seeds, and what failed."""
    lines = [
        "| transfer | metric | pretrained | random | difference | seeds |",
        "|---|---|---:|---:|---:|---:|",
        *("| " + " | ".join(cell.replace("|", r"\|") for cell in _cells(line)) + " |" for line in summaries(found)),
    ]
    failed = [f"- {item.transfer} failed: {item.reason}" for item in found.failed]
    return "\n".join([*lines, *([""] if failed else []), *failed]) + "\n"


def rich_table(found: Comparison) -> "Table":
    """The summary for a terminal."""
    from rich.table import Table
    from rich.text import Text

    facts = found.pretraining
    loss, chance, std, knn = map(_number, (facts.loss, facts.chance_loss, facts.embedding_std, facts.knn_top1))
    caption = f"pretraining: loss {loss} (chance {chance}), embedding std {std} (1 is isotropic), kNN {knn}"
    table = Table(title=Text(facts.run), caption=Text(caption))
    for name in ("transfer", "metric", "pretrained", "random", "difference", "seeds"):
        table.add_column(name, justify="left" if name in ("transfer", "metric") else "right")
    for line in summaries(found):
        table.add_row(*map(Text, _cells(line)), style="" if not line.difference < 0 else "yellow")
    for item in found.failed:
        table.add_row(Text(item.transfer), Text(f"failed: {item.reason}"), style="red")
    return table


def write_comparison(found: Comparison, folder: Path) -> None:
    """Writes comparison.json, .csv and .md into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", to_json(found)), ("csv", to_csv(found)), ("md", to_markdown(found))):
        (folder / f"comparison.{suffix}").write_text(text, encoding="utf-8")


def _read_records(uri: str, run: str) -> _Records:
    experiment_id = connect(uri)
    found = find_runs(uri, experiment_id, {"hemoco.run": run})
    phases: dict[str, list[RunFacts]] = {"parent": [], "pretrain": [], "transfer": []}
    for facts in reversed(found):  # the oldest first
        phases[facts.tags["hemoco.phase"]].append(facts)
    if not phases["parent"]:
        raise UsageError(_unknown(run, find_runs(uri, experiment_id, {"hemoco.phase": "parent"})))
    parent = phases["parent"][-1]
    newest = {facts.tags["hemoco.transfer"]: facts for facts in phases["transfer"]}
    source = parent.tags.get("hemoco.pretrain_run_id")
    if source is not None:  # the backbone is another run's, which this MLflow need not know
        known = find_runs(uri, experiment_id, {"hemoco.phase": "pretrain"})
        phases["pretrain"] = [facts for facts in known if facts.run_id == source]
    return _Records(run, parent, next(reversed(phases["pretrain"]), None), list(newest.values()))


def _compare(records: _Records) -> Comparison:
    rows = [row for facts in records.transfers for row in _rows(facts)]
    failed = [
        Failure(
            transfer=facts.tags["hemoco.transfer"],
            reason=facts.tags.get("hemoco.error", "no reason was recorded"),
            run_id=facts.run_id,
        )
        for facts in records.transfers
        if facts.status in ("FAILED", "KILLED")
    ]
    return Comparison(pretraining=_pretraining(records), rows=tuple(rows), failed=tuple(failed))


def _pretraining(records: _Records) -> Pretraining:
    parent, facts = records.parent, records.pretraining
    tags = parent.tags | (facts.tags if facts else {})
    metrics = facts.metrics if facts else {}
    queue_length = facts.params.get("pretrain.moco.queue_length") if facts else None
    return Pretraining(
        run=records.run,
        run_id=facts.run_id if facts else tags.get("hemoco.pretrain_run_id", ""),
        status=facts.status if facts else "",
        backbone_url=parent.tags.get("hemoco.backbone_url") or tags.get("hemoco.backbone_url", ""),
        recipe=tags.get("hemoco.recipe", ""),
        data_digest=tags.get("hemoco.data_digest", ""),
        loss=metrics.get("loss", math.nan),
        chance_loss=math.log(int(queue_length) + 1) if queue_length else math.nan,
        embedding_std=metrics.get("embedding_std", math.nan),
        knn_top1=metrics.get("knn_top1", math.nan),
    )


def _rows(facts: RunFacts) -> list[Row]:
    rows = []
    for key, value in facts.metrics.items():
        match = _VALUE.fullmatch(key)
        if match and match["metric"] == facts.tags["hemoco.metric"]:
            row = Row(
                transfer=facts.tags["hemoco.transfer"],
                metric=match["metric"],
                init=match["init"],
                seed=int(match["seed"]),
                value=value,
                run_id=facts.run_id,
            )
            rows.append(row)
    return sorted(rows, key=lambda row: (row.init, row.seed))


def _unknown(run: str, parents: list[RunFacts]) -> str:
    names = list(dict.fromkeys(facts.tags["hemoco.run"] for facts in parents))
    if not names:
        return f"run {run!r} is not in MLflow, which has none: begin one with `python -m jobs run RECIPE`"
    shown = difflib.get_close_matches(run, names, n=3) or names[:10]
    return f"run {run!r} is not in MLflow; there are {len(names)}, among them {', '.join(shown)}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _cells(line: Summary) -> list[str]:
    difference = "-" if math.isnan(line.difference) else f"{line.difference:+.3f}"
    return [line.transfer, line.metric, _number(line.pretrained), _number(line.random), difference, str(line.seeds)]
