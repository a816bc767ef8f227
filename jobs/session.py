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
from hemoco.report.data import collect_report
from hemoco.report.files import rich_table, to_markdown, write_comparison
from hemoco.report.page import render_report
from hemoco.results.comparison import ManyComparison, compare_runs
from hemoco.results.records import Comparison, comparison, headlines
from hemoco.storage.objects import home
from hemoco.tracking.client import connect, tracking_uri
from hemoco.tracking.metric_queue import send_points
from hemoco.tracking.runs import find_run, log_artifact_bytes, set_tags
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
    print(f"run         {name}\nstatus      {shlex.join(['python', '-m', 'jobs', 'status', name])}", flush=True)


def run_tags(verb: str, recipe_word: str) -> dict[str, str]:
    """What MLflow gets to know of how a run was begun: the code, the verb, the file of a recipe given by its path."""
    tags = {**git_facts(CHECKOUT), Tag.VERB: verb}
    if recipe_word.endswith(".py"):
        path = Path(recipe_word).resolve()  # in the checkout relative to it, for a submitted job has a copy of that
        tags[Tag.RECIPE_FILE] = str(path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path)
    return tags


def print_comparison(run: str, out: str) -> Path:
    """Prints a run's table, writes comparison.{json,csv,md} and report.html, says where; returns the folder."""
    folder = results_folder(run, out)
    console = table_console()
    console.print(rich_table(write_results(run, folder)))
    console.print(f"report      {folder / 'report.html'}", soft_wrap=True, highlight=False)
    again = shlex.join(["python", "-m", "jobs", "compare", run])
    console.print(f"again       {again}", soft_wrap=True, highlight=False)
    return folder


def results_folder(name: str, out: str) -> Path:
    """Where results go: what was given, else a folder of this name."""
    return Path(out).expanduser().resolve() if out else home() / "reports" / name


def write_results(run: str, folder: Path) -> Comparison:
    """Writes comparison.{json,csv,md} and report.html of a run."""
    many = compare_runs(tracking_uri(), [run])
    found = many.runs[0].found
    write_comparison(found, folder)
    write_report(many, folder)
    return found


def write_report(many: ManyComparison, folder: Path) -> None:
    """Writes report.html of one run or of several."""
    (folder / "report.html").write_text(render_report(collect_report(tracking_uri(), many)), encoding="utf-8")


def table_console() -> Console:
    """As wide as the terminal, or as a file is wide."""
    return Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)


def publish(run: str, folder: Path) -> None:
    """Puts the results on the page of the run they are of: the files, the table as its note, the means as metrics."""
    uri = tracking_uri()
    parent = find_run(uri, connect(uri), {Tag.RUN: run, Tag.PHASE: "parent"})
    assert parent is not None, "the comparison was just read from it"
    found = comparison(uri, run)
    for name in ("comparison.json", "comparison.csv", "comparison.md", "report.html"):
        log_artifact_bytes(uri, parent.run_id, name, (folder / name).read_bytes())
    set_tags(
        uri, parent.run_id, {"mlflow.note.content": f"{to_markdown(found)}\nMore: report.html among the artifacts."}
    )
    now = int(time.time() * 1000)
    points = [MetricPoint(key=key, value=value, timestamp=now, step=0) for key, value in headlines(found).items()]
    send_points(uri, parent.run_id, points, patience_s=_PATIENCE_S)
