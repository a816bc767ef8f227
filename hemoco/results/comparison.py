"""Several runs side by side: a column for each pretraining and for each baseline, a line for each transfer.

Pretrainings whose settings differ by `pretrain.seed` only, with the same data, are repetitions of one thing and share a
column. Their values are not thrown together: a column keeps them by pretraining and seed, and the pretraining is what
is repeated when recipes are compared. What two runs call by the same name is compared only if its settings and data
agree.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
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
    """One of the runs that are compared."""

    label: str
    """A, B, ...; A1, A2, ... where several are repetitions of one pretraining; `pretrained` where it is alone."""
    records: Records
    results: RunResults
    settings: dict[str, str] | None
    """Of the pretraining and its data; None where MLflow does not know them."""
    cost: Cost

    @property
    def name(self) -> str:
        """Of the run."""
        return self.records.run

    @property
    def seed(self) -> str:
        """Of the pretraining; empty where unknown."""
        return (self.settings or {}).get("pretrain.seed", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A pretraining, once or repeated, or a baseline."""

    label: str
    runs: tuple[Run, ...]
    """The pretraining's; of a baseline those that measured it."""
    baseline: str
    """Its init; empty for a pretraining."""
    differs: tuple[str, ...] = ()
    """Settings in which a pretraining differs from that of the first column."""


class Cell(NamedTuple):
    """A cell: a line and a column."""

    line: str
    column: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One transfer with one protocol."""

    label: str
    """The transfer's name, with the runs it is of where their protocols differ."""
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
    """Runs side by side; cells without a value are missing from `values`."""

    runs: tuple[Run, ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    values: dict[Cell, Repetitions]
    pairs: tuple[Pair, ...]
    """All of two pretrainings, and of a pretraining and a baseline, where both have values."""
    curve: dict[tuple[int, Cell], Repetitions]
    """Transfer quality of the backbones after so many epochs."""

    @property
    def pretrainings(self) -> tuple[Column, ...]:
        """The columns that are no baselines; they come first."""
        return tuple(column for column in self.columns if not column.baseline)

    def spread(self, line: Line, column: Column) -> RepeatedSpread:
        """Mean and deviation of a cell; nan where it has no value."""
        return repeated_spread(self.values.get(Cell(line.label, column.label), ()))


def compare_runs(uri: str, names: Sequence[str]) -> Comparison:
    """What MLflow has recorded of some runs so far, side by side in this order.

    Raises:
        UsageError: MLflow knows no run of one of the names, or one comes twice.
        TrackingError: MLflow cannot be used.
    """
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"run {', '.join(sorted(twice))} is named twice: name each run once")
    every = [read_records(uri, name) for name in names]
    known = [
        Run(
            label="",
            records=records,
            results=results_of(records),
            settings=pretraining_settings(uri, records),
            cost=run_cost(uri, records),
        )
        for records in every
    ]
    pretrainings = _pretrainings(known)
    runs = tuple(
        sorted(
            (run for column in pretrainings for run in column.runs),
            key=lambda run: names.index(run.name),
        )
    )
    columns = (*pretrainings, *_baselines(runs))
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
    """Means of a single run by the names they have on its page: TRANSFER/METRIC/INIT, and the differences.

    A difference is pretrained minus baseline: TRANSFER/METRIC/over_INIT.
    """
    names = {line.label: f"{line.transfer}/{line.metric}" for line in comparison.lines}
    means = {
        f"{names[place.line]}/{place.column}": repeated_spread(found).mean
        for place, found in comparison.values.items()
    }
    over = {
        f"{names[pair.line]}/over_{pair.theirs}": pair.difference.mean for pair in comparison.pairs
    }
    return {name: value for name, value in (means | over).items() if not math.isnan(value)}


def _pretrainings(runs: Sequence[Run]) -> tuple[Column, ...]:
    """Runs by what they repeat; each group has a letter and its runs a number if there are several."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if _repeats(run, group)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    first = groups[0][0].settings
    columns = []
    for label, group in zip(_letters() if len(runs) > 1 else [PRETRAINED], groups, strict=False):
        named = [
            dataclasses.replace(run, label=f"{label}{number}" if len(group) > 1 else label)
            for number, run in enumerate(group, start=1)
        ]
        columns.append(
            Column(
                label=label,
                runs=tuple(named),
                baseline="",
                differs=tuple(_difference(first, group[0].settings)),
            )
        )
    return tuple(columns)


def _repeats(run: Run, group: Sequence[Run]) -> bool:
    """Whether a run is one more repetition: all settings but the seed agree, and none of the group has its seed."""
    ours, theirs = run.settings, group[0].settings
    if ours is None or theirs is None or run.seed in {other.seed for other in group}:
        return False
    return config_difference(ours | {"pretrain.seed": ""}, theirs | {"pretrain.seed": ""}) == []


def _difference(first: dict[str, str] | None, other: dict[str, str] | None) -> list[str]:
    return config_difference(first, other) if first is not None and other is not None else []


def _letters() -> Iterable[str]:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return (
        "".join(letters)
        for size in itertools.count(1)
        for letters in itertools.product(alphabet, repeat=size)
    )


def _baselines(runs: Sequence[Run]) -> tuple[Column, ...]:
    """The inits other than the pretrained one; of two that share a name and not their origin each is a column."""
    found: dict[str, list[tuple[dict[str, str], list[Run]]]] = {}
    for run in runs:
        for init in dict.fromkeys(row.init for row in run.results.rows if row.init != PRETRAINED):
            identity, same = baseline_identity(run.records, init), found.setdefault(init, [])
            group = next((group for known, group in same if known == identity), None)
            if group is None:
                same.append((identity, [run]))
            else:
                group.append(run)
    return tuple(
        Column(
            label=init if len(same) == 1 else f"{init} of {_named(group)}",
            runs=tuple(group),
            baseline=init,
        )
        for init, same in found.items()
        for _, group in same
    )


def _lines(runs: Sequence[Run]) -> tuple[Line, ...]:
    """Each transfer that a run has begun, once for each protocol; the order of the first run that has it."""
    found: dict[str, list[tuple[dict[str, str], list[Run]]]] = {}
    for run in runs:
        for facts in (*run.records.transfers, *run.records.curve):
            protocol = transfer_protocol(run.records, facts)
            same = found.setdefault(facts.tags[Tag.TRANSFER], [])
            group = next(
                (group for known, group in same if not config_difference(known, protocol)), None
            )
            if group is None:
                same.append((protocol, [run]))
            elif run not in group:
                group.append(run)
    return tuple(
        Line(
            label=transfer if len(same) == 1 else f"{transfer} of {_named(group)}",
            transfer=transfer,
            metric=protocol["metric"],
            runs=tuple(group),
            protocol=protocol,
            differs=tuple(config_difference(same[0][0], protocol)),
        )
        for transfer, same in found.items()
        for protocol, group in same
    )


def _named(runs: Sequence[Run]) -> str:
    return ", ".join(run.label for run in runs)


def _values(columns: Sequence[Column], lines: Sequence[Line]) -> dict[Cell, Repetitions]:
    values: dict[Cell, Repetitions] = {}
    for column, line in itertools.product(columns, lines):
        runs = [run for run in column.runs if run in line.runs]
        init = column.baseline or PRETRAINED
        measured = [by_seed for run in runs if (by_seed := seed_values(run, line.transfer, init))]
        if column.baseline and measured:
            measured = [_means(measured)]
        if measured:
            values[Cell(line.label, column.label)] = measured
    return values


def seed_values(run: Run, transfer: str, init: str) -> SeedValues:
    """Values of one transfer from one backbone."""
    return {
        row.seed: row.value
        for row in run.results.rows
        if (row.transfer, row.init) == (transfer, init)
    }


def _means(measured: Sequence[SeedValues]) -> SeedValues:
    """A baseline measured by several runs: the same seed draws the same, so it is one value, not several."""
    seeds = sorted({seed for by_seed in measured for seed in by_seed})
    of_seed = {seed: [by_seed[seed] for by_seed in measured if seed in by_seed] for seed in seeds}
    return {seed: sum(some) / len(some) for seed, some in of_seed.items()}


def _pairs(
    columns: Sequence[Column], lines: Sequence[Line], values: dict[Cell, Repetitions]
) -> Iterable[Pair]:
    for ours, theirs in itertools.combinations(columns, 2):
        if ours.baseline:
            continue
        for line in lines:
            both = [values.get(Cell(line.label, column.label)) for column in (ours, theirs)]
            if both[0] and both[1]:
                difference = repeated_difference(both[0], both[1], baseline=bool(theirs.baseline))
                yield Pair(
                    line=line.label, ours=ours.label, theirs=theirs.label, difference=difference
                )


def _curve(
    uri: str, columns: Sequence[Column], lines: Sequence[Line]
) -> dict[tuple[int, Cell], Repetitions]:
    curve: dict[tuple[int, Cell], list[SeedValues]] = {}
    for column, line in itertools.product(columns, lines):
        for run in (run for run in column.runs if run in line.runs):
            for epoch, by_seed in curve_values(
                uri, run.records, line.transfer, line.metric
            ).items():
                curve.setdefault((epoch, Cell(line.label, column.label)), []).append(by_seed)
    return dict(curve)
