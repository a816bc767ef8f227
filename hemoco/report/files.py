"""Runs side by side as files: JSON with all of it, CSV, Markdown and LaTeX."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hemoco.intervals import repeated_spread
from hemoco.report.comparison_tables import known, main_sections
from hemoco.report.extra_tables import extra_sections
from hemoco.report.tables import Section, Value, csv_text, latex, markdown
from hemoco.results.comparison import ManyComparison, Place

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
