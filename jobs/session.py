"""Functions that verbs share: the Ray session, the tags of a run, the output of results."""

import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from cluster.local.ray import local_ray
from cluster.submit.checkout import CHECKOUT, git_facts
from hemoco.report.comparison_tables import main_sections
from hemoco.report.files import sections, write_comparison
from hemoco.report.tables import markdown, print_section
from hemoco.results.comparison import Comparison, compare_runs, headlines
from hemoco.storage.objects import home
from hemoco.tracking.client import connect, tracking_uri
from hemoco.tracking.metric_queue import send_points
from hemoco.tracking.runs import log_artifact_bytes, set_tags
from hemoco.tracking.tags import Tag
from hemoco.tracking.unsent import MetricPoint

_PATIENCE_S = 60.0


@contextmanager
def ray_session() -> Iterator[None]:
    """Starts or joins Ray for this command, once MLflow has answered."""
    connect(tracking_uri())
    with local_ray():
        take_sigterm_as_ctrl_c()
        yield


def take_sigterm_as_ctrl_c() -> None:
    """Turns SIGTERM into KeyboardInterrupt, so that the run is closed in MLflow.

    Must be called after Ray has started: ray.init installs a handler of its own, which ends the
    process at once.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def announce(name: str) -> None:
    """Prints the run's name first: nothing else may be printed for minutes."""
    status = shlex.join(["python", "-m", "jobs", "status", name])
    print(f"run         {name}\nstatus      {status}", flush=True)


def run_tags(verb: str, recipe_argument: str) -> dict[str, str]:
    """Tags that record how a run was started.

    Args:
        verb: verb of `python -m jobs`.
        recipe_argument: the recipe as it was typed, a name or a path.

    Returns:
        Tags for the commit, the verb, and the file of a recipe given by its path.
    """
    tags = {**git_facts(CHECKOUT), Tag.VERB: verb}
    if recipe_argument.endswith(".py"):
        path = Path(recipe_argument).resolve()
        if path.is_relative_to(CHECKOUT):  # a submitted job runs in a copy of the checkout
            path = path.relative_to(CHECKOUT)
        tags[Tag.RECIPE_FILE] = str(path)
    return tags


def show_results(run: str, out: str) -> Comparison:
    """Prints a finished run's tables, writes them to a folder and adds them to its MLflow run."""
    comparison = compare_runs(tracking_uri(), [run])
    folder = results_folder(run, out)
    write_results(comparison, folder)
    print_results(comparison, folder)
    publish(comparison, folder)
    return comparison


def results_folder(name: str, out: str) -> Path:
    """Returns the folder for results: `--out`, or one of this name in $HEMOCO_HOME/reports."""
    return Path(out).expanduser().resolve() if out else home() / "reports" / name


def write_results(comparison: Comparison, folder: Path) -> None:
    """Writes comparison.{json,csv,md} and report.html of one run or of several."""
    # imported late: torch takes seconds, and an unknown run is reported at once
    from hemoco.report.data import collect_report
    from hemoco.report.page import render_report

    write_comparison(comparison, folder)
    report = render_report(collect_report(tracking_uri(), comparison))
    (folder / "report.html").write_text(report, encoding="utf-8")


def print_results(comparison: Comparison, folder: Path) -> None:
    """Prints the tables, the path of the report, and the command that prints them again."""
    console = table_console()
    for section in sections(comparison):
        print_section(console, section)
    console.print()
    names = [run.name for run in comparison.runs]
    lines = {
        "report": str(folder / "report.html"),
        "again": shlex.join(["python", "-m", "jobs", "compare", *names]),
    }
    for title, text in lines.items():
        console.print(f"{title:<12}{text}", soft_wrap=True, highlight=False, markup=False)


def table_console(file_width: int = 120) -> Console:
    """Returns a console as wide as the terminal, or with so many columns for a pipe or a file."""
    return Console(width=None if sys.stdout.isatty() else file_width)


def publish(comparison: Comparison, folder: Path) -> None:
    """Adds the results of one run to its parent run in MLflow.

    The files become artifacts, the main tables the description, the means metrics.
    """
    uri, parent = tracking_uri(), comparison.runs[0].records.parent.run_id
    for name in ("comparison.json", "comparison.csv", "comparison.md", "report.html"):
        log_artifact_bytes(uri, parent, name, (folder / name).read_bytes())
    description = f"{markdown(main_sections(comparison))}\nMore: report.html among the artifacts."
    set_tags(uri, parent, {"mlflow.note.content": description})
    now_ms = int(time.time() * 1000)
    points = [
        MetricPoint(key=key, value=value, timestamp=now_ms, step=0)
        for key, value in headlines(comparison).items()
    ]
    send_points(uri, parent, points, patience_s=_PATIENCE_S)
