"""What the verbs share: names, places, the Ray session and the printed table."""

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
_FILE_WIDTH = 120  # columns where no terminal says how wide it is


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray for this command, after MLflow has answered: what can fail at once fails before anything starts."""
    connect(tracking_uri())
    with local_ray():
        take_sigterm_as_ctrl_c()
        yield


def take_sigterm_as_ctrl_c() -> None:
    """So that MLflow learns of it. To be said when Ray is there, whose own handler ends the process at once."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def announce(name: str) -> None:
    """Says first what is worked at, for it may be long until anything else is said."""
    print(
        f"run         {name}\nstatus      {shlex.join(['python', '-m', 'jobs', 'status', name])}",
        flush=True,
    )


def run_tags(verb: str, recipe_word: str) -> dict[str, str]:
    """What MLflow gets to know of how a run was begun: the code, the verb, the file of a recipe given by its path."""
    tags = {**git_facts(CHECKOUT), Tag.VERB: verb}
    if recipe_word.endswith(".py"):
        path = Path(
            recipe_word
        ).resolve()  # in the checkout relative to it, for a submitted job has a copy of that
        tags[Tag.RECIPE_FILE] = str(
            path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path
        )
    return tags


def show_results(run: str, out: str) -> Comparison:
    """Prints a finished run's tables, writes them to a folder, and puts them on the run's page in MLflow."""
    many = compare_runs(tracking_uri(), [run])  # read once, for all of them
    folder = results_folder(run, out)
    write_results(many, folder)
    print_results(many, folder)
    publish(many, folder)
    return many


def results_folder(name: str, out: str) -> Path:
    """Where results go: what was given, else a folder of this name."""
    return Path(out).expanduser().resolve() if out else home() / "reports" / name


def write_results(many: Comparison, folder: Path) -> None:
    """Writes comparison.{json,csv,md} and report.html of one run or of several."""
    from hemoco.report.data import (
        collect_report,
    )  # torch takes seconds to import, errors should not
    from hemoco.report.page import render_report

    write_comparison(many, folder)
    report = render_report(collect_report(tracking_uri(), many))
    (folder / "report.html").write_text(report, encoding="utf-8")


def print_results(many: Comparison, folder: Path) -> None:
    """Prints the tables and where the files are."""
    console = table_console()
    for section in sections(many):
        print_section(console, section)
    console.print()
    names = [run.name for run in many.runs]
    for title, text in (
        ("report", str(folder / "report.html")),
        ("again", shlex.join(["python", "-m", "jobs", "compare", *names])),
    ):
        console.print(f"{title:<12}{text}", soft_wrap=True, highlight=False, markup=False)


def table_console() -> Console:
    """As wide as the terminal, or as a file is wide."""
    return Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)


def publish(many: Comparison, folder: Path) -> None:
    """Puts the results on the page of their run: the files, the main tables as its note, the means as metrics."""
    uri, parent = tracking_uri(), many.runs[0].records.parent.run_id
    for name in ("comparison.json", "comparison.csv", "comparison.md", "report.html"):
        log_artifact_bytes(uri, parent, name, (folder / name).read_bytes())
    note = f"{markdown(main_sections(many))}\nMore: report.html among the artifacts."
    set_tags(uri, parent, {"mlflow.note.content": note})
    now = int(time.time() * 1000)
    points = [
        MetricPoint(key=key, value=value, timestamp=now, step=0)
        for key, value in headlines(many).items()
    ]
    send_points(uri, parent, points, patience_s=_PATIENCE_S)
