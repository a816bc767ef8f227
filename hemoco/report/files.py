"""Runs side by side as files: JSON with all of it, CSV, Markdown and LaTeX."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from hemoco.intervals import repeated_spread
from hemoco.report.comparison_tables import known, main_sections
from hemoco.report.extra_tables import extra_sections
from hemoco.report.tables import Section, Value, csv_text, latex, markdown
from hemoco.results.comparison import ManyComparison, Place
from hemoco.results.records import Comparison, Row, Summary, summaries

Format = Literal["markdown", "csv", "json", "latex"]
SUFFIXES: dict[Format, str] = {"markdown": "md", "csv": "csv", "json": "json", "latex": "tex"}
_IN_WIDE = ("transfers", "differences")


def sections(many: ManyComparison) -> list[Section]:
    """All tables that there is something for."""
    return [*main_sections(many), *extra_sections(many)]


def render(many: ManyComparison, form: Format) -> str:
    """All of it in one text; as CSV the table of transfers with its differences."""
    found = sections(many)
    if form == "json":
        return _json(many, found)
    if form == "csv":
        return csv_text(wide_records(many))
    return markdown(found) if form == "markdown" else latex(found)


def write_files(many: ManyComparison, folder: Path, stem: str) -> None:
    """Writes STEM.json, .csv, .md and .tex, rows.csv with the single values, and a CSV for each further table."""
    folder.mkdir(parents=True, exist_ok=True)
    for form, suffix in SUFFIXES.items():
        (folder / f"{stem}.{suffix}").write_text(render(many, form), encoding="utf-8")
    (folder / "rows.csv").write_text(csv_text(row_records(many)), encoding="utf-8")
    for section in sections(many):
        if section.name not in _IN_WIDE:
            (folder / f"{section.name}.csv").write_text(csv_text(section.records), encoding="utf-8")


def wide_records(many: ManyComparison) -> list[dict[str, Value]]:
    """One for each transfer: mean, deviation and number of values of each column, then the differences."""
    records = []
    for line in many.lines:
        record: dict[str, Value] = {"transfer": line.label, "metric": line.metric}
        for column in many.columns:
            spread = repeated_spread(many.values.get(Place(line.label, column.label), ()))
            record |= {
                f"{column.label} mean": known(spread.mean),
                f"{column.label} sd": known(spread.sd),
                f"{column.label} pretrainings": None if column.baseline else spread.pretrainings,
                f"{column.label} values": spread.values,
            }
        for pair in (pair for pair in many.pairs if pair.line == line.label):
            name, difference = f"{pair.ours} - {pair.theirs}", pair.difference
            record |= {
                name: known(difference.mean),
                f"{name} half width": known(difference.half_width),
                f"{name} beyond noise": difference.stands_out,
            }
        records.append(record)
    return records


def row_records(many: ManyComparison) -> list[dict[str, Value]]:
    """One for each value: those of comparison.json, with the run, its pretraining and that one's seed."""
    return [
        dataclasses.asdict(row)
        | {"run": run.name, "label": run.label, "pretraining": run.found.pretraining.run_id, "pretrain_seed": run.seed}
        for run in many.runs
        for row in run.found.rows
    ]


def _json(many: ManyComparison, found: Sequence[Section]) -> str:
    """`pretraining` of the first run and `rows` as in the comparison of one run; then a list for each table."""
    first = dataclasses.asdict(many.runs[0].found.pretraining)
    pretraining = {name: known(value) if isinstance(value, float) else value for name, value in first.items()}
    tables = {section.name: section.records for section in found}
    return json.dumps({"pretraining": pretraining, "rows": row_records(many)} | tables, indent=2) + "\n"


COLUMNS = ("transfer", "metric", "pretrained", "against", "value", "difference", "seeds", "beyond noise")
"""Of the table of summaries, as `summary_cells` fills it."""


_NUMBERS = ("pretrained", "value", "difference", "seeds")


_BROKEN = ("pretrained", "value", "difference", "beyond noise")  # in two lines where the terminal is narrow


_WIDEST_NAME = 20  # of a transfer, before it is broken


_LEGEND = "± after a value: deviation over seeds; after a difference: its 95% interval; beyond noise: it leaves out 0"


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
    """One line per transfer and baseline: means over the seeds with their deviation, and what failed or is open."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---:|---|---:|---:|---:|---|",
        *(
            "| " + " | ".join(cell.replace("|", r"\|") for cell in summary_cells(line)) + " |"
            for line in summaries(found)
        ),
    ]
    failed = [f"- {item.transfer} failed: {_escaped(item.reason)}" for item in found.failed]
    failed += [f"- {item.transfer} is unfinished: {item.reason}" for item in found.unfinished]
    legend = ["", _LEGEND] if any(line.difference.pairs > 1 for line in summaries(found)) else []
    return "\n".join([*lines, *legend, *([""] if failed else []), *failed]) + "\n"


def rich_table(found: Comparison) -> "Table":
    """The summary for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    facts = found.pretraining
    loss, chance, std, knn = map(_number, (facts.loss, facts.chance_loss, facts.embedding_std, facts.knn_top1))
    caption = f"pretraining: loss {loss} (chance {chance}), embedding std {std} (1 is isotropic), kNN {knn}"
    if any(line.difference.pairs > 1 for line in summaries(found)):
        caption += f"\n{_LEGEND}"
    below = Text(f"\n{caption}")
    for item in found.failed:
        below.append(f"\n{item.transfer} failed: {item.reason}", style="bold red")
    for item in found.unfinished:
        below.append(f"\n{item.transfer} is unfinished: {item.reason}", style="bold yellow")
    table = Table(
        title=Text(facts.run),
        caption=below,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,  # the box has a space between columns
        pad_edge=False,
    )
    for name in COLUMNS:
        table.add_column(
            name, justify="right" if name in _NUMBERS else "left", overflow="fold", no_wrap=name not in _BROKEN
        )
    table.columns[0].no_wrap = all(len(row.transfer) <= _WIDEST_NAME for row in found.rows)
    for line in summaries(found):
        table.add_row(*map(Text, summary_cells(line)), style="" if not line.difference.mean < 0 else "yellow")
    return table


def write_comparison(found: Comparison, folder: Path) -> None:
    """Writes comparison.json, .csv and .md into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", to_json(found)), ("csv", to_csv(found)), ("md", to_markdown(found))):
        (folder / f"comparison.{suffix}").write_text(text, encoding="utf-8")


def summary_cells(line: Summary) -> list[str]:
    """The line as text, one cell for each of `COLUMNS`: means +- deviation, the difference +- its 95% interval."""
    difference = line.difference
    shown = "-" if math.isnan(difference.mean) else f"{difference.mean:+.3f}{_margin(difference.half_width)}"
    unknown = {0: "-", 1: "one seed"}.get(difference.pairs, "no spread")
    noise = {True: "yes", False: "no", None: unknown}[difference.stands_out]
    seeds = str(difference.pairs or max(line.pretrained.values, line.other.values))
    ours, theirs = (f"{_number(spread.mean)}{_margin(spread.sd)}" for spread in (line.pretrained, line.other))
    return [line.transfer, line.metric, ours, line.baseline or "-", theirs, shown, seeds, noise]


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _margin(value: float) -> str:
    return "" if math.isnan(value) else f" ± {value:.3f}"
