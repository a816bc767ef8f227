"""`python -m jobs compare RUN [RUN ...]`: the tables of one run or of several side by side, from MLflow alone."""

import hashlib
import sys
from typing import Annotated, Literal

import tyro

from hemoco.errors import UsageError
from hemoco.names import check_run_name
from hemoco.report.extra_tables import extra_sections
from hemoco.report.files import render, sections, write_files
from hemoco.report.tables import print_section
from hemoco.results.comparison import compare_runs
from hemoco.tracking.client import tracking_uri
from jobs.session import print_comparison, results_folder, table_console, write_report, write_results


def main(argv: list[str]) -> None:
    """Prints tables and writes files."""
    tyro.cli(compare, args=argv, prog="python -m jobs compare")


def compare(
    runs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")
    ] = (),
    /,
    *,
    out: str = "",
    format: Literal["table", "markdown", "csv", "json", "latex"] = "table",
) -> None:
    """The tables of one run, or of several side by side, from MLflow alone.

    One run: its transfers against their baselines, over epochs and labels, and its cost; report.html. Several: a column
    for each pretraining, those that differ by --pretrain.seed only together in one.

    Args:
        runs: names of runs.
        out: folder for files; default: a folder in $HEMOCO_HOME/reports. One run writes comparison.json, .csv, .md and
            report.html, and details.* with its curves and cost; several write comparison.json, .csv, .md and .tex, and
            report.html. Both add rows.csv (the single values) and a CSV file for each further table.
        format: what is printed.
    """
    if not runs:
        raise UsageError("compare needs the name of a run, or of several: `python -m jobs status` lists them")
    for run in runs:  # names a folder, too
        check_run_name("RUN", run)
    alone = len(runs) == 1
    many = compare_runs(tracking_uri(), runs)
    folder = results_folder(runs[0] if alone else _folder_name(runs), out)
    write_files(many, folder, "details" if alone else "comparison")
    if not alone:
        write_report(many, folder)
    if format != "table":
        if alone:
            write_results(runs[0], folder)
        sys.stdout.write(render(many, format))
        return
    console = table_console()
    for section in extra_sections(many) if alone else sections(many):
        print_section(console, section)
    console.print()
    if alone:
        print_comparison(runs[0], out)
    else:
        console.print(f"files       {folder}", soft_wrap=True, highlight=False)


def _folder_name(runs: tuple[str, ...]) -> str:
    digest = hashlib.sha256("\n".join(runs).encode()).hexdigest()[:8]
    return f"{runs[0]}_and_{len(runs) - 1}_more-{digest}"
