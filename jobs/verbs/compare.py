"""`python -m jobs compare RUN [RUN ...]`: the tables of one run or of several side by side, from MLflow alone."""

import hashlib
import sys
from typing import Annotated, Literal

import tyro

from hemoco.errors import UsageError
from hemoco.names import check_run_name
from hemoco.report.files import render, write_tables
from hemoco.results.comparison import compare_runs
from hemoco.tracking.client import tracking_uri
from jobs.session import print_results, results_folder, write_results


def main(argv: list[str]) -> None:
    """Prints tables and writes files."""
    tyro.cli(compare, args=argv, prog="python -m jobs compare")


def compare(
    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint=""),
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
        out: folder for files; default: a folder in $HEMOCO_HOME/reports. comparison.json, .csv, .md, .tex and
            report.html are written, rows.csv (the single values) and a CSV file for each further table; of one run
            also details.json and details.csv with its curves and cost.
        format: what is printed.
    """
    if not runs:
        raise UsageError(
            "compare needs the name of a run, or of several: `python -m jobs status` lists them"
        )
    for run in runs:  # names a folder, too
        check_run_name("RUN", run)
    many = compare_runs(tracking_uri(), runs)
    folder = results_folder(_folder_name(runs), out)
    write_results(many, folder)
    write_tables(many, folder)
    if format == "table":
        print_results(many, folder)
    else:
        sys.stdout.write(render(many, format))


def _folder_name(runs: tuple[str, ...]) -> str:
    if len(runs) == 1:
        return runs[0]
    digest = hashlib.sha256("\n".join(runs).encode()).hexdigest()[:8]
    return f"{runs[0]}_and_{len(runs) - 1}_more-{digest}"
