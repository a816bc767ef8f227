"""Tables of compared runs: the pretrainings, how they transfer, and how they differ."""

import math
from collections.abc import Sequence

from hemoco.intervals import RepeatedDifference, RepeatedSpread, Repetitions, repeated_spread
from hemoco.report.tables import Section, Value
from hemoco.results.comparison import Cell, Column, Comparison, Line, Pair, Run, seed_values
from hemoco.results.records import PRETRAINED

SIGNIFICANT = "significant (95%)"
"""Name of a column with yes, no or n/a: whether the 95% interval of a difference excludes 0."""
_MOST_SETTINGS = 8


def main_sections(comparison: Comparison) -> list[Section]:
    """Returns the tables of pretrainings, transfers, differences and repetitions.

    Tables without rows are left out, except for transfers with notes: none has begun, and the
    notes name them.
    """
    sections = [_pretrainings(comparison), _transfers(comparison), _differences(comparison)]
    for column in comparison.pretrainings:
        if len(column.runs) > 1:
            sections.append(_repetitions(comparison, column))
    return [
        section
        for section in sections
        if section.rows or (section.name == "transfers" and section.notes)
    ]


def number(value: float, digits: int = 3) -> str:
    """Formats a number; nan becomes a dash."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def known(value: float) -> float | None:
    """Returns None for nan and infinity, which JSON and CSV have no form for."""
    return value if math.isfinite(value) else None


def _pretrainings(comparison: Comparison) -> Section:
    rows, records = [], []
    notes: list[str] = []
    for column in comparison.pretrainings:
        notes += _column_notes(column, comparison.columns[0])
        for run in column.runs:
            facts = run.results.pretraining
            numbers = (facts.loss, facts.chance_loss, facts.embedding_std, facts.knn_top1)
            rows.append(
                (run.label, run.name, run.seed or "-", facts.status or "-", *map(number, numbers))
            )
            records.append(_pretraining_record(run, column))
    unknown = ", ".join(run.label for run in comparison.runs if run.settings is None)
    if unknown:
        notes.append(f"{unknown}: the pretraining is not in this MLflow")
    return Section(
        name="pretrainings",
        title="Pretrainings",
        columns=("", "run", "seed", "status", "loss", "chance", "embedding std", "kNN"),
        heads=2,
        rows=tuple(rows),
        notes=tuple(notes),
        records=tuple(records),
    )


def _column_notes(column: Column, first: Column) -> list[str]:
    """Returns which runs a column combines, and how its settings differ from the first one's."""
    notes = []
    if len(column.runs) > 1:
        names = ", ".join(run.label for run in column.runs)
        notes.append(
            f"{column.label} combines {names}: their settings differ only in pretrain.seed"
        )
    if column.differs:
        shown = "; ".join(column.differs[:_MOST_SETTINGS])
        more = len(column.differs) - _MOST_SETTINGS
        if more > 0:
            shown += f"; and {more} more"
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
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, Value]] = []
    best = set()
    columns = comparison.columns
    heads = ("transfer", "metric")
    for line in comparison.lines:
        means = [comparison.spread(line, column).mean for column in columns]
        highest = max((mean for mean in means if not math.isnan(mean)), default=math.nan)
        if len(columns) > 1:
            for index, mean in enumerate(means):
                if mean == highest:
                    best.add((len(rows), len(heads) + index))
        cells = [value_cell(comparison, line, column) for column in columns]
        rows.append((line.label, line.metric, *cells))
        records += line_records(comparison, line)
    return Section(
        name="transfers",
        title="Transfers: mean ± standard deviation (number of values)",
        columns=(*heads, *(column.label for column in columns)),
        heads=len(heads),
        rows=tuple(rows),
        best=frozenset(best),
        notes=tuple(_transfer_notes(comparison)),
        records=tuple(records),
    )


def value_cell(comparison: Comparison, line: Line, column: Column) -> str:
    """Returns a cell of the table of transfers: the value, or the reason why there is none.

    A dagger marks a value of a transfer that failed or is unfinished for some of its units.
    """
    values = comparison.values.get(Cell(line.label, column.label))
    state = "" if column.baseline else _state(line, column)
    if not values:
        return state or "-"
    return f"{spread_cell(values)} †" if state else spread_cell(values)


def spread_cell(values: Repetitions) -> str:
    """Formats a mean: "0.625 ± 0.177 (3)" for 3 seeds, "(2x3)" for 2 pretrainings of 3 seeds each.

    Where the pretrainings have different numbers of seeds, their mean number is shown.
    """
    spread = repeated_spread(values)
    deviation = "" if math.isnan(spread.sd) else f" ± {spread.sd:.3f}"
    if len({len(by_seed) for by_seed in values}) == 1:
        count = str(len(values[0]))
    else:
        count = f"{spread.values / len(values):.1f}"
    if len(values) > 1:
        count = f"{len(values)}x{count}"
    return f"{number(spread.mean)}{deviation} ({count})"


def _state(line: Line, column: Column) -> str:
    """Returns the state of a pretraining's transfer if it failed or is unfinished, else ""."""
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
    if repeated and comparison.lines:
        notes.append(
            f"± of {', '.join(repeated)}: between pretrainings; "
            "of the others: over the transfer's seeds"
        )
    for run in comparison.runs:
        for item in run.results.failed:
            notes.append(f"† {run.label}: {item.transfer} failed: {item.reason}")
        for item in run.results.unfinished:
            notes.append(f"† {run.label}: {item.transfer} is unfinished: {item.reason}")
    return notes


def line_records(comparison: Comparison, line: Line) -> list[dict[str, Value]]:
    """Returns a record for each cell of a line."""
    return [
        mean_record(line.label, line.metric, column.label, comparison.spread(line, column))
        for column in comparison.columns
    ]


def mean_record(line: str, metric: str, column: str, spread: RepeatedSpread) -> dict[str, Value]:
    """Returns a record of a cell."""
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
    by_cell = {(pair.line, pair.ours, pair.theirs): pair.difference for pair in comparison.pairs}
    columns = ["transfer"]
    for ours, theirs in kinds:
        columns += [f"{ours} - {theirs}", SIGNIFICANT]
    rows = []
    for line in comparison.lines:
        cells = [line.label]
        for kind in kinds:
            difference = by_cell.get((line.label, *kind))
            cells += [_difference_cell(difference), _significance(difference)]
        rows.append(tuple(cells))
    if len(rows) > 1:
        rows.append(("higher in", *_counts(comparison.pairs, kinds, sign=1)))
        rows.append(("lower in", *_counts(comparison.pairs, kinds, sign=-1)))
    return Section(
        name="differences",
        title="Differences: mean ± 95% interval",
        columns=tuple(columns),
        rows=tuple(rows) if kinds else (),
        joined=frozenset(range(2, len(columns), 2)),
        notes=tuple(_difference_notes(comparison)),
        records=tuple(_difference_record(pair) for pair in comparison.pairs),
    )


def _difference_cell(difference: RepeatedDifference | None) -> str:
    if difference is None or math.isnan(difference.mean):
        return "-"
    margin = "" if math.isnan(difference.half_width) else f" ± {difference.half_width:.3f}"
    return f"{difference.mean:+.3f}{margin}"


def _significance(difference: RepeatedDifference | None) -> str:
    if difference is None or math.isnan(difference.mean):
        return "-"
    if difference.stands_out is None:
        return "n/a (one seed)" if math.isnan(difference.half_width) else "n/a (no variation)"
    return "yes" if difference.stands_out else "no"


def _counts(pairs: Sequence[Pair], kinds: Sequence[tuple[str, str]], *, sign: int) -> list[str]:
    """Counts the transfers whose difference has a sign, and the significant ones among them.

    Returns:
        Two cells for each kind (our column, their column) of difference.
    """
    cells = []
    for kind in kinds:
        differences = [
            pair.difference
            for pair in pairs
            if (pair.ours, pair.theirs) == kind and pair.difference.seeds
        ]
        chosen = [difference for difference in differences if difference.mean * sign > 0]
        significant = sum(difference.stands_out is True for difference in chosen)
        cells += [f"{len(chosen)} of {len(differences)}", f"yes in {significant}"]
    return cells


def _difference_notes(comparison: Comparison) -> list[str]:
    notes = [
        "paired by the transfer's seed; significant: the 95% interval excludes 0",
        "the intervals are not corrected for multiple comparisons: "
        "if nothing differed, one in twenty would exclude 0 by chance",
    ]
    of_recipes: list[str] = []
    of_backbones: list[str] = []
    for pair in comparison.pairs:
        name = f"{pair.ours} - {pair.theirs}"
        if "pretrainings" in pair.difference.noise and name not in of_recipes:
            of_recipes.append(name)
        if pair.difference.noise == ("seeds",) and name not in of_backbones:
            of_backbones.append(name)
    if of_recipes:
        notes.append(
            f"the intervals of {', '.join(of_recipes)} include the variation between pretrainings "
            "with different seeds"
        )
        compared = {label for name in of_recipes for label in name.split(" - ")}
        single = [
            column.label
            for column in comparison.pretrainings
            if len(column.runs) == 1 and column.label in compared
        ]
        if single:
            notes.append(
                f"{', '.join(single)} has one pretraining; "
                "its variation is assumed to equal that of the repeated side"
            )
    if of_backbones:
        notes.append(
            f"the intervals of {', '.join(of_backbones)} include only the variation between the "
            "transfer's seeds, so they hold for these backbones; for a statement about the "
            "recipes, compare pretrainings with several values of --pretrain.seed"
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
    """Returns the table of a column's single pretrainings and their variation."""
    rows: list[tuple[str, ...]] = []
    records = []
    for line in comparison.lines:
        spread = comparison.spread(line, column)
        if not spread.values:
            continue
        cells = []
        for run in column.runs:
            by_seed = seed_values(run, line.transfer, PRETRAINED) if run in line.runs else {}
            cells.append(spread_cell([by_seed]) if by_seed else "-")
        rows.append((line.label, *cells, number(spread.between), number(spread.within)))
        records.append(mean_record(line.label, line.metric, column.label, spread))
    return Section(
        name=f"repetitions_{column.label}",
        title=f"Repetitions of {column.label}: variation with the pretraining's seed",
        columns=("transfer", *(run.label for run in column.runs), "sd between", "sd over seeds"),
        rows=tuple(rows),
        notes=(
            "sd between pretrainings includes sd over seeds, divided by the square root of the "
            "number of seeds",
        ),
        records=tuple(records),
    )
