"""`python -m jobs compare RUN [RUN ...]`: tables and reports of runs, read from MLflow alone."""

import hashlib
import sys
from typing import Annotated, Literal

import tyro

from hemoco.errors import UsageError
from hemoco.names import check_run_name
from hemoco.report.files import render, write_tables
from hemoco.results.comparison import compare_runs
from hemoco.tracking.client import tracking_uri
from jobs.arguments import Folder, read_arguments
from jobs.session import print_results, results_folder, write_results

_Runs = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint=""),
]


def main(argv: list[str]) -> None:
    """Prints the tables and writes the files."""
    read_arguments(compare, argv, command="compare")


def compare(
    runs: _Runs = (),
    /,
    *,
    out: Folder = "",
    format: Literal["table", "markdown", "csv", "json", "latex"] = "table",
) -> None:
    """Prints the tables of one run, or of several side by side, and writes them as files.

    One run: its transfers against their baselines, over epochs and labels, and its cost.

    Several runs: one column for each pretraining; seeds of the same pretraining share a column.

    Args:
        runs: names of runs.
        out: folder for the files; default: a folder in $HEMOCO_HOME/reports. It receives
            comparison.json, .csv, .md and .tex, report.html, rows.csv (the single values) and a CSV
            file for each further table; for one run also details.json and details.csv with its
            curves and cost.
        format: format in which the tables are printed.
    """
    if not runs:
        raise UsageError(
            "compare needs the name of a run, or of several: `python -m jobs status` lists them"
        )
    for run in runs:  # the names become names of folders, too
        check_run_name("RUN", run)
    comparison = compare_runs(tracking_uri(), runs)
    folder = results_folder(_folder_name(runs), out)
    write_results(comparison, folder)
    write_tables(comparison, folder)
    if format == "table":
        print_results(comparison, folder)
    else:
        sys.stdout.write(render(comparison, format))


def _folder_name(runs: tuple[str, ...]) -> str:
    if len(runs) == 1:
        return runs[0]
    digest = hashlib.sha256("\n".join(runs).encode()).hexdigest()[:8]
    return f"{runs[0]}_and_{len(runs) - 1}_more-{digest}"
