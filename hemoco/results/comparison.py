"""Several runs side by side: a column for each pretraining and baseline, a line for each transfer.

Pretrainings whose settings differ only in `pretrain.seed`, on the same data, are repetitions and
share a column. Their values are not pooled: a cell keeps them by pretraining and by the transfer's
seed, since the unit of repetition is the pretraining when recipes are compared.

Two runs may use one name for different things. Transfers and baselines of the same name are
compared only if their settings and data agree (`hemoco.results.identity`); otherwise each has a
line or column of its own.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hemoco.config import config_difference
from hemoco.errors import UsageError
from hemoco.intervals import (
    RepeatedDifference,
    RepeatedSpread,
    Repetitions,
    repeated_difference,
    repeated_spread,
)
from hemoco.results.cost import Cost, run_cost
from hemoco.results.identity import (
    baseline_identity,
    curve_values,
    pretraining_settings,
    transfer_protocol,
)
from hemoco.results.records import PRETRAINED, Records, RunResults, read_records, results_of
from hemoco.tracking.tags import Tag

SeedValues = dict[int, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One of the compared runs."""

    label: str
    """A, B, ...; A1, A2, ... for repetitions of one pretraining; `pretrained` for a single run."""
    records: Records
    results: RunResults
    settings: dict[str, str] | None
    """Settings of the pretraining and its data; None if MLflow does not have them."""
    cost: Cost

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.records.run

    @property
    def seed(self) -> str:
        """Seed of the pretraining; empty if unknown."""
        return (self.settings or {}).get("pretrain.seed", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A pretraining with its repetitions, or a baseline."""

    label: str
    runs: tuple[Run, ...]
    """The repetitions of a pretraining, or the runs that measured a baseline."""
    baseline: str
    """Init of the baseline; empty for a pretraining."""
    differs: tuple[str, ...] = ()
    """Settings in which a pretraining differs from that of the first column."""


class Cell(NamedTuple):
    """Labels of a line and a column."""

    line: str
    column: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One transfer with one protocol."""

    label: str
    """Name of the transfer, followed by the runs that have it if their protocols differ."""
    transfer: str
    metric: str
    runs: tuple[Run, ...]
    protocol: dict[str, str]
    differs: tuple[str, ...]
    """Settings in which it differs from the first line of its name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """The difference of two columns in one line."""

    line: str
    ours: str
    theirs: str
    difference: RepeatedDifference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side; `values` has no entry for a cell without a value."""

    runs: tuple[Run, ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    values: dict[Cell, Repetitions]
    pairs: tuple[Pair, ...]
    """Differences of pretrainings from each other and from baselines, where both have values."""
    curve: dict[tuple[int, Cell], Repetitions]
    """Values of transfers from backbones of earlier epochs, by (epoch, cell)."""

    @property
    def pretrainings(self) -> tuple[Column, ...]:
        """The columns that are not baselines; they come first."""
        return tuple(column for column in self.columns if not column.baseline)

    def spread(self, line: Line, column: Column) -> RepeatedSpread:
        """Returns mean and deviation of a cell; nan if it has no value."""
        return repeated_spread(self.values.get(Cell(line.label, column.label), ()))


def compare_runs(uri: str, names: Sequence[str]) -> Comparison:
    """Returns what MLflow has recorded of some runs so far, side by side in this order.

    Raises:
        UsageError: MLflow has no run of one of the names, or a name is given twice.
        TrackingError: MLflow cannot be used.
    """
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"run {', '.join(sorted(twice))} is named twice: name each run once")
    all_records = [read_records(uri, name) for name in names]
    unlabelled = [
        Run(
            label="",
            records=records,
            results=results_of(records),
            settings=pretraining_settings(uri, records),
            cost=run_cost(uri, records),
        )
        for records in all_records
    ]
    pretrainings = _pretraining_columns(unlabelled)
    labelled = [run for column in pretrainings for run in column.runs]
    runs = tuple(sorted(labelled, key=lambda run: names.index(run.name)))
    columns = (*pretrainings, *_baseline_columns(runs))
    lines = _lines(runs)
    values = _values(columns, lines)
    return Comparison(
        runs=runs,
        columns=columns,
        lines=lines,
        values=values,
        pairs=tuple(_pairs(columns, lines, values)),
        curve=_curve(uri, pretrainings, lines),
    )


def headlines(comparison: Comparison) -> dict[str, float]:
    """Returns the finite means and differences of a single run, as logged to its page in MLflow.

    Means are named TRANSFER/METRIC/INIT, and differences (pretrained minus baseline)
    TRANSFER/METRIC/over_INIT.
    """
    prefixes = {line.label: f"{line.transfer}/{line.metric}" for line in comparison.lines}
    named = {}
    for cell, values in comparison.values.items():
        named[f"{prefixes[cell.line]}/{cell.column}"] = repeated_spread(values).mean
    for pair in comparison.pairs:
        named[f"{prefixes[pair.line]}/over_{pair.theirs}"] = pair.difference.mean
    return {name: value for name, value in named.items() if not math.isnan(value)}


def _pretraining_columns(runs: Sequence[Run]) -> tuple[Column, ...]:
    """Groups runs that repeat one pretraining, and labels the groups and their runs."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if _repeats(run, group)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    first = groups[0][0].settings
    labels = _letters() if len(runs) > 1 else iter([PRETRAINED])
    columns = []
    for group in groups:
        label = next(labels)
        labelled = [
            dataclasses.replace(run, label=f"{label}{number}" if len(group) > 1 else label)
            for number, run in enumerate(group, start=1)
        ]
        settings = group[0].settings
        differs = []
        if first is not None and settings is not None:
            differs = config_difference(first, settings)
        column = Column(label=label, runs=tuple(labelled), baseline="", differs=tuple(differs))
        columns.append(column)
    return tuple(columns)


def _repeats(run: Run, group: Sequence[Run]) -> bool:
    """Returns whether a run repeats a group's pretraining: same settings, but a new seed."""
    ours, theirs = run.settings, group[0].settings
    if ours is None or theirs is None or run.seed in {other.seed for other in group}:
        return False
    return config_difference(ours | {"pretrain.seed": ""}, theirs | {"pretrain.seed": ""}) == []


def _letters() -> Iterator[str]:
    """Yields A to Z, then AA, AB, ..."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for size in itertools.count(1):
        for letters in itertools.product(alphabet, repeat=size):
            yield "".join(letters)


def _baseline_columns(runs: Sequence[Run]) -> tuple[Column, ...]:
    """Returns a column for each baseline; inits of one name but different origin stay apart."""
    groups_of: dict[str, list[tuple[dict[str, str], list[Run]]]] = {}
    for run in runs:
        for init in dict.fromkeys(row.init for row in run.results.rows if row.init != PRETRAINED):
            identity = baseline_identity(run.records, init)
            groups = groups_of.setdefault(init, [])
            group = next((group for other, group in groups if other == identity), None)
            if group is None:
                groups.append((identity, [run]))
            else:
                group.append(run)
    columns = []
    for init, groups in groups_of.items():
        for _, group in groups:
            label = init if len(groups) == 1 else f"{init} of {_labels(group)}"
            columns.append(Column(label=label, runs=tuple(group), baseline=init))
    return tuple(columns)


def _lines(runs: Sequence[Run]) -> tuple[Line, ...]:
    """Returns a line for each protocol of each transfer that has begun, in the runs' order."""
    groups_of: dict[str, list[tuple[dict[str, str], list[Run]]]] = {}
    for run in runs:
        for facts in (*run.records.transfers, *run.records.curve):
            protocol = transfer_protocol(run.records, facts)
            groups = groups_of.setdefault(facts.tags[Tag.TRANSFER], [])
            group = next(
                (group for other, group in groups if not config_difference(other, protocol)), None
            )
            if group is None:
                groups.append((protocol, [run]))
            elif run not in group:
                group.append(run)
    lines = []
    for transfer, groups in groups_of.items():
        first_protocol = groups[0][0]
        for protocol, group in groups:
            line = Line(
                label=transfer if len(groups) == 1 else f"{transfer} of {_labels(group)}",
                transfer=transfer,
                metric=protocol["metric"],
                runs=tuple(group),
                protocol=protocol,
                differs=tuple(config_difference(first_protocol, protocol)),
            )
            lines.append(line)
    return tuple(lines)


def _labels(runs: Sequence[Run]) -> str:
    return ", ".join(run.label for run in runs)


def _values(columns: Sequence[Column], lines: Sequence[Line]) -> dict[Cell, Repetitions]:
    values: dict[Cell, Repetitions] = {}
    for column, line in itertools.product(columns, lines):
        init = column.baseline or PRETRAINED
        of_runs = [seed_values(run, line.transfer, init) for run in column.runs if run in line.runs]
        measured = [by_seed for by_seed in of_runs if by_seed]
        if measured and column.baseline:
            # The same seed draws the same everywhere: several runs measured one value, not several.
            measured = [_means(measured)]
        if measured:
            values[Cell(line.label, column.label)] = measured
    return values


def seed_values(run: Run, transfer: str, init: str) -> SeedValues:
    """Returns the values of one transfer from one backbone, by seed."""
    return {
        row.seed: row.value
        for row in run.results.rows
        if (row.transfer, row.init) == (transfer, init)
    }


def _means(measured: Sequence[SeedValues]) -> SeedValues:
    means = {}
    for seed in sorted(set().union(*measured)):
        values = [by_seed[seed] for by_seed in measured if seed in by_seed]
        means[seed] = sum(values) / len(values)
    return means


def _pairs(
    columns: Sequence[Column], lines: Sequence[Line], values: dict[Cell, Repetitions]
) -> Iterator[Pair]:
    for ours, theirs in itertools.combinations(columns, 2):
        if ours.baseline:
            continue
        for line in lines:
            our_values = values.get(Cell(line.label, ours.label))
            their_values = values.get(Cell(line.label, theirs.label))
            if our_values and their_values:
                difference = repeated_difference(
                    our_values, their_values, baseline=bool(theirs.baseline)
                )
                yield Pair(
                    line=line.label, ours=ours.label, theirs=theirs.label, difference=difference
                )


def _curve(
    uri: str, columns: Sequence[Column], lines: Sequence[Line]
) -> dict[tuple[int, Cell], Repetitions]:
    curve: dict[tuple[int, Cell], list[SeedValues]] = {}
    for column, line in itertools.product(columns, lines):
        cell = Cell(line.label, column.label)
        for run in column.runs:
            if run not in line.runs:
                continue
            by_epoch = curve_values(uri, run.records, line.transfer, line.metric)
            for epoch, by_seed in by_epoch.items():
                curve.setdefault((epoch, cell), []).append(by_seed)
    return dict(curve)
