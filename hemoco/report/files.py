"""A comparison as files: JSON with all of it, CSV, Markdown and LaTeX."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hemoco.report.comparison_tables import SIGNIFICANT, known, main_sections
from hemoco.report.extra_tables import extra_sections
from hemoco.report.tables import Section, Value, csv_text, latex, markdown
from hemoco.results.comparison import Comparison
from hemoco.results.records import Row, RunResults

Format = Literal["markdown", "csv", "json", "latex"]
_IN_WIDE = ("transfers", "differences")
"""Tables that comparison.csv contains, which therefore have no file of their own."""


def sections(comparison: Comparison) -> list[Section]:
    """Returns all tables that have content."""
    return [*main_sections(comparison), *extra_sections(comparison)]


def render(comparison: Comparison, form: Format) -> str:
    """Returns all tables as one text; CSV has the transfers and their differences only."""
    if form == "csv":
        return csv_text(wide_records(comparison))
    tables = sections(comparison)
    if form == "json":
        return _json(comparison, tables)
    return markdown(tables) if form == "markdown" else latex(tables)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes comparison.json, .csv and .md into a folder, creating it if needed.

    For one run, JSON and CSV have the form that other tools rely on: JSON with `pretraining` and
    `rows`, CSV with one line for each row. For several runs, JSON has all tables, and CSV one line
    for each transfer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"md": render(comparison, "markdown")}
    if len(comparison.runs) == 1:
        results = comparison.runs[0].results
        rows = [dataclasses.asdict(row) for row in results.rows]
        texts["json"] = contract_json(results)
        texts["csv"] = csv_text(rows, [field.name for field in dataclasses.fields(Row)])
    else:
        texts["json"] = render(comparison, "json")
        texts["csv"] = render(comparison, "csv")
    for suffix, text in texts.items():
        (folder / f"comparison.{suffix}").write_text(text, encoding="utf-8")


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Writes all tables for other programs: LaTeX, rows.csv with the single values, and a CSV each.

    For one run, details.json and details.csv have what comparison.json and comparison.csv have for
    several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.tex": render(comparison, "latex"),
        "rows.csv": csv_text(row_records(comparison)),
    }
    if len(comparison.runs) == 1:
        texts["details.json"] = render(comparison, "json")
        texts["details.csv"] = render(comparison, "csv")
    for section in sections(comparison):
        if section.name not in _IN_WIDE:
            texts[f"{section.name}.csv"] = csv_text(section.records)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def wide_records(comparison: Comparison) -> list[dict[str, Value]]:
    """Returns a record for each transfer.

    It has mean, deviation and number of values of each column, then the differences.
    """
    records = []
    for line in comparison.lines:
        record: dict[str, Value] = {"transfer": line.label, "metric": line.metric}
        for column in comparison.columns:
            spread = comparison.spread(line, column)
            record |= {
                f"{column.label} mean": known(spread.mean),
                f"{column.label} sd": known(spread.sd),
                f"{column.label} pretrainings": None if column.baseline else spread.pretrainings,
                f"{column.label} values": spread.values,
            }
        for pair in comparison.pairs:
            if pair.line != line.label:
                continue
            name, difference = f"{pair.ours} - {pair.theirs}", pair.difference
            record |= {
                name: known(difference.mean),
                f"{name} half width": known(difference.half_width),
                f"{name} {SIGNIFICANT}": difference.stands_out,
            }
        records.append(record)
    return records


def row_records(comparison: Comparison) -> list[dict[str, Value]]:
    """Returns the rows of all runs, each with its run, its pretraining and the latter's seed."""
    records = []
    for run in comparison.runs:
        origin = {
            "run": run.name,
            "label": run.label,
            "pretraining": run.results.pretraining.run_id,
            "pretrain_seed": run.seed,
        }
        records += [dataclasses.asdict(row) | origin for row in run.results.rows]
    return records


def _json(comparison: Comparison, tables: Sequence[Section]) -> str:
    """Returns `pretraining` of the first run, `rows` of all runs, and a list for each table."""
    pretraining = comparison.runs[0].results.pretraining
    content: dict[str, Any] = {
        "pretraining": _known(dataclasses.asdict(pretraining)),
        "rows": row_records(comparison),
    }
    for section in tables:
        content[section.name] = section.records
    return json.dumps(content, indent=2) + "\n"


def contract_json(results: RunResults) -> str:
    """Returns comparison.json of one run: `pretraining` and `rows`; nan and infinity are null."""
    rows = [_known(dataclasses.asdict(row)) for row in results.rows]
    content = {"pretraining": _known(dataclasses.asdict(results.pretraining)), "rows": rows}
    return json.dumps(content, indent=2) + "\n"


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        name: known(value) if isinstance(value, float) else value for name, value in facts.items()
    }
