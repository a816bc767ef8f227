"""`python -m jobs compare RUN`: table and report of a run again, from MLflow alone."""

from typing import Annotated

import tyro

from jobs.session import print_comparison


def main(argv: list[str]) -> None:
    """Prints the table and writes the report."""
    tyro.cli(compare, args=argv, prog="python -m jobs compare")


def compare(run: Annotated[str, tyro.conf.Positional], /, *, out: str = "") -> None:
    """Table and report of a run again, from MLflow alone.

    Args:
        run: the run's name.
        out: folder for comparison.json, .csv, .md and report.html; default: the run's folder in $HEMOCO_HOME/reports.
    """
    print_comparison(run, out)
