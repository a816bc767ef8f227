"""Runs side by side as tables: what they are, how they transfer, and how they differ."""

import math
from collections.abc import Sequence

from hemoco.intervals import RepeatedDifference, RepeatedSpread, Repetitions, repeated_spread
from hemoco.report.tables import Section, Value
from hemoco.results.comparison import Cell, Column, Comparison, Line, Pair, Run, seed_values
from hemoco.results.records import PRETRAINED

_MOST_SETTINGS = 8


def main_sections(comparison: Comparison) -> list[Section]:
    """What the runs are, how they transfer, and how they differ; those that there is something for."""
    found = [
        _pretrainings(comparison),
        _transfers(comparison),
        _differences(comparison),
        *(
            _repetitions(comparison, column)
            for column in comparison.pretrainings
            if len(column.runs) > 1
        ),
    ]
    return [
        section
        for section in found
        if section.rows or (section.name == "transfers" and section.notes)
    ]


def number(value: float, digits: int = 3) -> str:
    """A dash where it is unknown."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def known(value: float) -> float | None:
    """None where it is unknown."""
    return value if math.isfinite(value) else None


def _pretrainings(comparison: Comparison) -> Section:
    rows, notes, records = [], list[str](), []
    for column in comparison.pretrainings:
        notes += _about(column, comparison.columns[0])
        for run in column.runs:
            facts = run.results.pretraining
            numbers = (facts.loss, facts.chance_loss, facts.embedding_std, facts.knn_top1)
            rows.append(
                (run.label, run.name, run.seed or "-", facts.status or "-", *map(number, numbers))
            )
            records.append(_pretraining_record(run, column))
    unknown = ", ".join(run.label for run in comparison.runs if run.settings is None)
    if unknown:
        notes.append(f"{unknown}: MLflow does not know the pretraining")
    return Section(
        name="pretrainings",
        title="Pretrainings",
        columns=("", "run", "seed", "status", "loss", "chance", "embedding std", "kNN"),
        heads=2,
        rows=tuple(rows),
        notes=tuple(notes),
        records=tuple(records),
    )


def _about(column: Column, first: Column) -> list[str]:
    notes = []
    if len(column.runs) > 1:
        names = ", ".join(run.label for run in column.runs)
        notes.append(
            f"{column.label} is {names} together: their settings differ by pretrain.seed only"
        )
    if column.differs:
        more = len(column.differs) - _MOST_SETTINGS
        shown = "; ".join(column.differs[:_MOST_SETTINGS]) + (
            f"; and {more} more" if more > 0 else ""
        )
        notes.append(f"{first.label} -> {column.label}: {shown}")
    return notes


def _pretraining_record(run: Run, column: Column) -> dict[str, Value]:
    facts = run.results.pretraining
    return {
        "label": run.label,
        "column": column.label,
        "run": run.name,
        "run_id": facts.run_id,
        "recipe": facts.recipe,
        "seed": run.seed,
        "status": facts.status,
        "loss": known(facts.loss),
        "chance_loss": known(facts.chance_loss),
        "embedding_std": known(facts.embedding_std),
        "knn_top1": known(facts.knn_top1),
        "backbone_url": facts.backbone_url,
        "data_digest": facts.data_digest,
        "differs": "; ".join(column.differs),
    }


def _transfers(comparison: Comparison) -> Section:
    rows, best, records = [], set[tuple[int, int]](), []
    for place, line in enumerate(comparison.lines):
        rows.append(
            (
                line.label,
                line.metric,
                *(value_cell(comparison, line, column) for column in comparison.columns),
            )
        )
        records += line_records(comparison, line)
        means = [comparison.spread(line, column).mean for column in comparison.columns]
        highest = max((mean for mean in means if not math.isnan(mean)), default=math.nan)
        if len(comparison.columns) > 1:
            best |= {
                (place, 2 + position) for position, mean in enumerate(means) if mean == highest
            }
    return Section(
        name="transfers",
        title="Transfers: mean ± deviation (how many values)",
        columns=("transfer", "metric", *(column.label for column in comparison.columns)),
        heads=2,
        rows=tuple(rows),
        best=frozenset(best),
        notes=tuple(_transfer_notes(comparison)),
        records=tuple(records),
    )


def value_cell(comparison: Comparison, line: Line, column: Column) -> str:
    """A cell of the table of transfers: the values, or why there are none."""
    values = comparison.values.get(Cell(line.label, column.label))
    state = "" if column.baseline else _state(line, column)
    return f"{spread_cell(values)}{' †' if state else ''}" if values else state or "-"


def spread_cell(values: Repetitions) -> str:
    """Mean ± deviation (seeds), or (pretrainings x seeds)."""
    spread = repeated_spread(values)
    margin = "" if math.isnan(spread.sd) else f" ± {spread.sd:.3f}"
    alike = len({len(by_seed) for by_seed in values}) == 1
    each = str(len(values[0])) if alike else f"{spread.values / len(values):.1f}"
    return f"{number(spread.mean)}{margin} ({f'{len(values)}x' if len(values) > 1 else ''}{each})"


def _state(line: Line, column: Column) -> str:
    """Why a pretraining has no value; empty where none was asked for."""
    for run in column.runs:
        if any(item.transfer == line.transfer for item in run.results.failed):
            return "failed"
        for item in run.results.unfinished:
            if item.transfer == line.transfer:
                return "unfinished" if item.run_id else item.reason
    return ""


def _transfer_notes(comparison: Comparison) -> list[str]:
    notes = [
        f"{line.label} has other settings: {'; '.join(line.differs)}"
        for line in comparison.lines
        if line.differs
    ]
    repeated = [column.label for column in comparison.pretrainings if len(column.runs) > 1]
    if repeated:
        notes.append(
            f"± of {', '.join(repeated)}: between pretrainings; of the others: over the transfer's seeds"
        )
    for run in comparison.runs:
        notes += [
            f"† {run.label}: {item.transfer} failed: {item.reason}" for item in run.results.failed
        ]
        notes += [
            f"† {run.label}: {item.transfer} is unfinished: {item.reason}"
            for item in run.results.unfinished
        ]
    return notes


def line_records(comparison: Comparison, line: Line) -> list[dict[str, Value]]:
    """A line's cells for programs."""
    return [
        mean_record(line.label, line.metric, column.label, comparison.spread(line, column))
        for column in comparison.columns
    ]


def mean_record(line: str, metric: str, column: str, spread: RepeatedSpread) -> dict[str, Value]:
    """A cell for programs."""
    return {
        "transfer": line,
        "metric": metric,
        "column": column,
        "mean": known(spread.mean),
        "sd": known(spread.sd),
        "between_pretrainings_sd": known(spread.between),
        "over_seeds_sd": known(spread.within),
        "pretrainings": spread.pretrainings,
        "values": spread.values,
    }


def _differences(comparison: Comparison) -> Section:
    kinds = list(dict.fromkeys((pair.ours, pair.theirs) for pair in comparison.pairs))
    of_place = {(pair.line, pair.ours, pair.theirs): pair.difference for pair in comparison.pairs}
    rows = [
        (line.label, *(_difference_cell(of_place.get((line.label, *kind))) for kind in kinds))
        for line in comparison.lines
    ]
    if len(rows) > 1:
        scores = [_scores(comparison.pairs, kind) for kind in kinds]
        rows.append(("higher, significant", *(higher for higher, _ in scores)))
        rows.append(("lower, significant", *(lower for _, lower in scores)))
    return Section(
        name="differences",
        title="Differences: mean ± 95% interval",
        columns=("transfer", *(f"{ours} - {theirs}" for ours, theirs in kinds)),
        rows=tuple(rows) if kinds else (),
        notes=tuple(_difference_notes(comparison)),
        records=tuple(_difference_record(pair) for pair in comparison.pairs),
    )


def _difference_cell(difference: RepeatedDifference | None) -> str:
    if difference is None or math.isnan(difference.mean):
        return "-"
    margin = "" if math.isnan(difference.half_width) else f" ± {difference.half_width:.3f}"
    return f"{difference.mean:+.3f}{margin} {_mark(difference)}".rstrip()


def _mark(difference: RepeatedDifference) -> str:
    return {True: "*", False: "", None: "?"}[difference.stands_out]


def _scores(pairs: Sequence[Pair], kind: tuple[str, str]) -> tuple[str, str]:
    """In how many transfers the first is higher, and lower, and in how many of them significantly."""
    differences = [
        pair.difference
        for pair in pairs
        if (pair.ours, pair.theirs) == kind and pair.difference.seeds
    ]
    higher = [difference for difference in differences if difference.mean > 0]
    lower = [difference for difference in differences if difference.mean < 0]

    def score(some: list[RepeatedDifference]) -> str:
        beyond = sum(difference.stands_out is True for difference in some)
        return f"{len(some)} of {len(differences)}, {beyond}"

    return score(higher), score(lower)


def _difference_notes(comparison: Comparison) -> list[str]:
    notes = [
        "paired by the transfer's seed; *: significant, the interval excludes 0; ?: n/a (one seed, or equal values)",
        "each interval stands alone: of twenty differences between equals one excludes 0 by chance",
    ]
    with_pretrainings = dict.fromkeys(
        f"{p.ours} - {p.theirs}" for p in comparison.pairs if "pretrainings" in p.difference.noise
    )
    others = dict.fromkeys(
        f"{p.ours} - {p.theirs}" for p in comparison.pairs if p.difference.noise == ("seeds",)
    )
    if with_pretrainings:
        notes.append(
            f"noise of the pretraining's seed is in the intervals of {', '.join(with_pretrainings)}"
        )
        single = [column.label for column in comparison.pretrainings if len(column.runs) == 1]
        compared = [
            label
            for label in single
            if any(label in name.split(" - ") for name in with_pretrainings)
        ]
        if compared:
            notes.append(
                f"{', '.join(compared)} has one pretraining, which is taken to scatter as the other's"
            )
    if others:
        notes.append(
            f"only the noise of the transfer's seeds is in those of {', '.join(others)}: they hold for these "
            "backbones; for their recipes, compare pretrainings with several values of --pretrain.seed"
        )
    if any(pair.difference.seeds == 0 for pair in comparison.pairs):
        notes.append("-: no seed in common")
    return notes


def _difference_record(pair: Pair) -> dict[str, Value]:
    difference = pair.difference
    return {
        "transfer": pair.line,
        "of": pair.ours,
        "minus": pair.theirs,
        "mean": known(difference.mean),
        "half_width": known(difference.half_width),
        "seeds": difference.seeds,
        "noise": "+".join(difference.noise),
        "stands_out": difference.stands_out,
    }


def _repetitions(comparison: Comparison, column: Column) -> Section:
    """Each pretraining of a column, and how far they lie apart."""
    rows, records = [], []
    for line in comparison.lines:
        spread = comparison.spread(line, column)
        if not spread.values:
            continue
        of_run = [
            seed_values(run, line.transfer, PRETRAINED) if run in line.runs else {}
            for run in column.runs
        ]
        cells = [spread_cell([by_seed]) if by_seed else "-" for by_seed in of_run]
        rows.append((line.label, *cells, number(spread.between), number(spread.within)))
        records.append(mean_record(line.label, line.metric, column.label, spread))
    return Section(
        name=f"repetitions_{column.label}",
        title=f"Repetitions of {column.label}: what the pretraining's seed does",
        columns=("transfer", *(run.label for run in column.runs), "sd between", "sd over seeds"),
        rows=tuple(rows),
        notes=(
            "the noise of the transfer's seeds is in sd between, divided by the root of their number",
        ),
        records=tuple(records),
    )
