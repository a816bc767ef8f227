"""`python -m jobs status [RUN]`: what runs, what has finished or failed, and how to go on."""

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.submit.environment import words_again
from hemoco.errors import HemocoError, UsageError
from hemoco.names import check_run_name
from hemoco.report.extra_tables import sweep_section
from hemoco.report.tables import print_section
from hemoco.results.status import RunStatus, newest_complete, newest_runs, run_status
from hemoco.results.sweep import SweepResult, find_sweep
from hemoco.storage.objects import join_url
from hemoco.tracking.client import tracking_uri
from hemoco.tracking.runs import RunFacts
from hemoco.tracking.tags import Tag
from jobs.options import settings_flags
from jobs.recorded_command import recorded_command
from jobs.verbs.submit import head_address

if TYPE_CHECKING:
    from cluster.submit.client import Job

_MOST = 20
_FILE_WIDTH = 160  # columns where no terminal says how wide it is
_UNDONE = {"FAILED": "failed", "KILLED": "interrupted"}


def main(argv: list[str]) -> None:
    """Tells."""
    tyro.cli(status, args=argv, prog="python -m jobs status", use_underscores=True)


def status(run: Annotated[str, tyro.conf.Positional] = "", /, *, address: str = "") -> None:
    """What runs, what has finished or failed, and how to go on.

    Args:
        run: the run's name; default: the newest runs.
        address: dashboard of a cluster's head, http://head:8265, to learn of its jobs too; default: $RAY_ADDRESS if it
            is one.
    """
    if run:
        check_run_name("RUN", run)
    named = address or os.environ.get("RAY_ADDRESS", "").startswith("http")
    jobs = _jobs(head_address(address), run) if named else []
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    if run:
        _show_run(console, run, jobs, head_address(address) if named else "")
    else:
        _show_runs(console, newest_runs(tracking_uri(), _MOST), jobs, bool(named))


def _jobs(address: str, run: str) -> list["Job"]:
    from cluster.submit.client import Cluster  # seconds to import, and mostly nobody asks

    return Cluster(address).jobs(run)


def _show_runs(console: Console, runs: list[RunStatus], jobs: list["Job"], asked: bool) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["run", "recipe", "status", "at", "last metric", *(["job"] if asked else [])]
    for column in columns:
        table.add_column(column, overflow="fold")
    newest = {job.run: job for job in reversed(jobs)}  # the first one of a run is its newest
    for found in runs:
        parent = found.parent
        cells = [
            found.run,
            parent.tags.get(Tag.RECIPE, ""),
            parent.status,
            _at(found),
            _ago(found.measured_s),
        ]
        table.add_row(
            *map(_plain, cells), *([_job_cell(newest.pop(found.run, None))] if asked else [])
        )
    for job in newest.values():  # packings, and runs that MLflow does not know
        table.add_row(
            _plain(job.run), "", "", _plain(job.words.partition(" ")[0]), "", _job_cell(job)
        )
    if table.row_count:
        console.print(table)
        console.print("\none of them: python -m jobs status RUN", highlight=False)
    else:
        console.print("no runs yet: begin one with `python -m jobs run RECIPE`", highlight=False)


def _show_run(console: Console, run: str, jobs: list["Job"], address: str) -> None:
    job = jobs[0] if jobs else None
    if sweep := find_sweep(tracking_uri(), run):
        return _show_sweep(console, sweep, job, address)
    try:
        found = run_status(tracking_uri(), run)
    except UsageError:
        if job is None:
            raise
        _say(console, {"run": run, "status": "MLflow does not know it", "job": _job_text(job)})
        return _say(console, {"again": _resume_words(None, job, address)})
    tags, status = found.parent.tags, found.parent.status
    recipe, storage = tags.get(Tag.RECIPE, ""), tags.get(Tag.STORAGE, "not recorded")
    lines = {"run": run, "recipe": recipe, "status": status, "storage": storage}
    if job is not None:
        lines["job"] = _job_text(job)
    _say(console, lines | {"checkpoint": _checkpoint(found)})
    _show_phases(console, found.phases)
    if status == "FINISHED":
        _say(console, {"table": shlex.join(["python", "-m", "jobs", "compare", run])})
    else:
        _say(console, _go_on(_resume_words(found, job, address), run, job, address))
    return None


def _show_sweep(console: Console, sweep: SweepResult, job: "Job | None", address: str) -> None:
    from jobs.verbs.sweep import best_lines  # torch, for what a sweep checks before it begins

    lines = {"sweep": sweep.sweep, "recipe": sweep.recipe, "status": sweep.status}
    if job is not None:
        lines["job"] = _job_text(job)
    _say(console, lines)
    print_section(console, sweep_section(sweep))
    console.print()
    _say(console, best_lines(sweep))
    if sweep.status != "FINISHED":
        again = _submit_words(job, address) if job is not None else _sweep_words(sweep)
        _say(console, _go_on(again, sweep.sweep, job, address))


def _go_on(again: str, run: str, job: "Job | None", address: str) -> dict[str, str]:
    """How to follow and to stop what runs as a job, how to resume what has ended."""
    if job is None or job.ended:
        return {"resume": again}
    return {
        "follow": again,
        "stop": shlex.join(["python", "-m", "jobs", "stop", run, "--address", address]),
    }


def _show_phases(console: Console, phases: tuple[RunFacts, ...]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("phase", "status", "step", "last metric", "starts", "error"):
        table.add_column(column, overflow="fold")
    for phase in phases:
        step = str(max(phase.steps.values(), default=""))
        attempts = (
            int(value) for name, value in phase.tags.items() if name.startswith(Tag.ATTEMPT_PREFIX)
        )
        starts, error = str(sum(attempts) or ""), phase.tags.get(Tag.ERROR, "")
        table.add_row(
            *map(_plain, (phase.name, phase.status, step, _ago(phase.measured_s), starts, error))
        )
    if phases:
        console.print()
        console.print(table)
        console.print()


def _checkpoint(found: RunStatus) -> str:
    storage = found.parent.tags.get(Tag.STORAGE)
    if not storage:  # an older version did not record it
        return "unknown"
    try:
        return newest_complete(join_url(storage, "pretrain", "checkpoints")) or "none yet"
    except HemocoError as error:
        return str(error)


def _resume_words(found: RunStatus | None, job: "Job | None", address: str) -> str:
    """The command that resumes a run, where it is known: from its job, or as it is recorded in MLflow."""
    if job is not None:
        return _submit_words(job, address)
    assert found is not None, "one of both is known"
    tags = found.parent.tags
    verb, backbone, storage = (
        tags.get(tag, "") for tag in (Tag.VERB, Tag.BACKBONE_URL, Tag.STORAGE)
    )
    if verb == "demo":
        return "cannot be, its storage has ended with it; python -m jobs demo begins another"
    if verb == "sweep":  # one of its trials
        whole = find_sweep(tracking_uri(), found.run.rpartition("/")[0])
        return _sweep_words(whole) if whole else "the command that began its sweep"
    unknown = _unknown(found.run)
    if verb == "transfer" and not backbone:  # it ended before it had read one
        return unknown
    command = recorded_command(tags, found.parent.params)
    if command is None:
        return unknown
    words = [verb or "run", command.recipe]
    if backbone:
        only = ["--only", *command.only] if command.only else []
        words = ["transfer", command.recipe, "--backbone", backbone, *only]
    folder = ["--storage", storage.removesuffix(f"/{found.run}")] if storage else []
    words += [*command.flags(), "--run", found.run, *folder]
    return shlex.join(["python", "-m", "jobs", *words])


def _sweep_words(sweep: SweepResult) -> str:
    command = recorded_command(sweep.tags, sweep.params)
    if command is None:
        return _unknown(sweep.sweep)
    # MLflow has the number that it began with; each one that was asked for is opened
    asked = command.settings.get(
        "sweep.trials", ""
    )  # by the last command, which may have ended before it opened them
    trials = max(
        int(sweep.params["sweep.trials"]), len(sweep.trials), int(asked) if asked.isdecimal() else 0
    )
    settings = settings_flags(command.settings | {"sweep.trials": str(trials)})
    storage = ["--storage", sweep.storage.removesuffix(f"/{sweep.sweep}")] if sweep.storage else []
    return shlex.join(
        ["python", "-m", "jobs", "sweep", command.recipe, *settings, "--run", sweep.sweep, *storage]
    )


def _unknown(run: str) -> str:
    return f"the command that began it, with {shlex.join(['--run', run])}"


def _submit_words(job: "Job", address: str) -> str:
    again = words_again(shlex.split(job.words))
    return shlex.join(["python", "-m", "jobs", "submit", *again, "--address", address])


def _at(found: RunStatus) -> str:
    """What it works on, in few words: the pretraining's step, then how many transfers are done."""
    if found.is_sweep:
        return _counted("trials", found.phases, _UNDONE | {"KILLED": "stopped"})
    training = next((phase for phase in found.phases if phase.name == "pretrain"), None)
    transfers = [
        phase for phase in found.phases if phase.name != "pretrain" and "@" not in phase.name
    ]
    if not transfers:
        if training is None:
            return ""
        step = max(training.steps.values(), default=0)
        return f"pretrain, step {step}" if step else "pretrain"
    return _counted("transfers", transfers, _UNDONE)


def _counted(what: str, phases: Sequence[RunFacts], undone: dict[str, str]) -> str:
    """How many are done, and of how many one of these statuses says why not."""
    counts = Counter(phase.status for phase in phases)
    others = [f"{counts[status]} {word}" for status, word in undone.items() if counts[status]]
    return ", ".join([f"{what}, {counts['FINISHED']} of {len(phases)} done", *others])


def _say(console: Console, lines: dict[str, str]) -> None:
    for name, text in lines.items():
        console.print(_plain(f"{name:<12}{text}"), soft_wrap=True)


def _job_text(job: "Job") -> str:
    status = f" with exit status {job.exit_status}" if job.exit_status else ""
    return f"{job.id} {job.status}{status}{f', commit {job.commit}' if job.commit else ''}"


def _job_cell(job: "Job | None") -> Text:
    return _plain(f"{job.id} {job.status}" if job else "")


def _ago(moment: float | None) -> str:
    if moment is None:
        return ""
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _plain(text: str) -> Text:
    """Text that rich prints as it is: brackets in a name are no markup."""
    return Text(text)
