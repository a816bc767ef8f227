"""Runs side by side as files: JSON with all of it, CSV, Markdown and LaTeX."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hemoco.report.comparison_tables import known, main_sections
from hemoco.report.extra_tables import extra_sections
from hemoco.report.tables import Section, Value, csv_text, latex, markdown
from hemoco.results.comparison import Comparison
from hemoco.results.records import Row, RunResults

Format = Literal["markdown", "csv", "json", "latex"]
_IN_WIDE = ("transfers", "differences")


def sections(comparison: Comparison) -> list[Section]:
    """All tables that there is something for."""
    return [*main_sections(comparison), *extra_sections(comparison)]


def render(comparison: Comparison, form: Format) -> str:
    """All of it in one text; as CSV the table of transfers with its differences."""
    found = sections(comparison)
    if form == "json":
        return _json(comparison, found)
    if form == "csv":
        return csv_text(wide_records(comparison))
    return markdown(found) if form == "markdown" else latex(found)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes comparison.json, .csv and .md into a folder, which is made.

    Those of one run are what other tools rely on: JSON with `pretraining` and `rows`, CSV with one line per row. Of
    several runs JSON has all tables, and CSV one line per transfer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": render(comparison, "json"),
        "csv": render(comparison, "csv"),
        "md": render(comparison, "markdown"),
    }
    if len(comparison.runs) == 1:
        results = comparison.runs[0].results
        rows = [dataclasses.asdict(row) for row in results.rows]
        texts["json"] = contract_json(results)
        texts["csv"] = csv_text(rows, [field.name for field in dataclasses.fields(Row)])
    for suffix, text in texts.items():
        (folder / f"comparison.{suffix}").write_text(text, encoding="utf-8")


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Writes all tables once more, for other programs: LaTeX, rows.csv with the single values, and a CSV for each.

    details.json and details.csv have of one run what comparison.json and comparison.csv have of several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.tex": render(comparison, "latex"),
        "rows.csv": csv_text(row_records(comparison)),
    }
    if len(comparison.runs) == 1:
        texts |= {
            "details.json": render(comparison, "json"),
            "details.csv": render(comparison, "csv"),
        }
    texts |= {
        f"{found.name}.csv": csv_text(found.records)
        for found in sections(comparison)
        if found.name not in _IN_WIDE
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def wide_records(comparison: Comparison) -> list[dict[str, Value]]:
    """One for each transfer: mean, deviation and number of values of each column, then the differences."""
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
        for pair in (pair for pair in comparison.pairs if pair.line == line.label):
            name, difference = f"{pair.ours} - {pair.theirs}", pair.difference
            record |= {
                name: known(difference.mean),
                f"{name} half width": known(difference.half_width),
                f"{name} significant (95%)": difference.stands_out,
            }
        records.append(record)
    return records


def row_records(comparison: Comparison) -> list[dict[str, Value]]:
    """One for each value: those of comparison.json, with the run, its pretraining and that one's seed."""
    records = []
    for run in comparison.runs:
        pretraining = run.results.pretraining.run_id
        about = {
            "run": run.name,
            "label": run.label,
            "pretraining": pretraining,
            "pretrain_seed": run.seed,
        }
        records += [dataclasses.asdict(row) | about for row in run.results.rows]
    return records


def _json(comparison: Comparison, found: Sequence[Section]) -> str:
    """`pretraining` of the first run and `rows` as in the comparison of one run; then a list for each table."""
    pretraining = _known(dataclasses.asdict(comparison.runs[0].results.pretraining))
    tables = {section.name: section.records for section in found}
    return (
        json.dumps({"pretraining": pretraining, "rows": row_records(comparison)} | tables, indent=2)
        + "\n"
    )


def contract_json(results: RunResults) -> str:
    """comparison.json of one run: `pretraining` and `rows`; numbers that are unknown or not finite are null."""
    rows = [_known(dataclasses.asdict(row)) for row in results.rows]
    facts = {"pretraining": _known(dataclasses.asdict(results.pretraining)), "rows": rows}
    return json.dumps(facts, indent=2) + "\n"


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        name: known(value) if isinstance(value, float) else value for name, value in facts.items()
    }
