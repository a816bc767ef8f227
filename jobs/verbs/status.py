"""`python -m jobs status [RUN]`: what is running, has finished or failed, and how to resume it."""

import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.submit.environment import resuming_argv
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
from jobs.arguments import Url, read_arguments
from jobs.options import settings_flags
from jobs.recorded_command import recorded_command
from jobs.session import table_console
from jobs.verbs.submit import head_address

if TYPE_CHECKING:
    from cluster.submit.client import Job

_MOST = 20
_FILE_WIDTH = 160  # columns if the output is not a terminal
_UNDONE = {"FAILED": "failed", "KILLED": "interrupted"}
_Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]", help_behavior_hint="")]


def main(argv: list[str]) -> None:
    """Prints the newest runs, or one run."""
    read_arguments(status, argv, command="status")


def status(run: _Run = "", /, *, address: Url = "") -> None:
    """Lists the newest runs, or shows one run and the command that resumes it.

    Args:
        run: name of the run; default: list the newest runs.
        address: dashboard of a cluster's head, http://head:8265, to show its jobs too; default:
            $RAY_ADDRESS if it is one.
    """
    if run:
        check_run_name("RUN", run)
    with_jobs = address or os.environ.get("RAY_ADDRESS", "").startswith("http")
    head = head_address(address) if with_jobs else ""
    jobs = _jobs(head, run) if head else []
    console = table_console(_FILE_WIDTH)
    if run:
        _show_run(console, run, jobs, head)
    else:
        _show_runs(console, newest_runs(tracking_uri(), _MOST), jobs, bool(head))


def _jobs(address: str, run: str) -> list["Job"]:
    # imported late: Ray takes seconds, and most calls of `status` do not need it
    from cluster.submit.client import Cluster

    return Cluster(address).jobs(run)


def _show_runs(console: Console, runs: list[RunStatus], jobs: list["Job"], with_jobs: bool) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["run", "recipe", "status", "at", "last metric"]
    if with_jobs:
        columns.append("job")
    for column in columns:
        table.add_column(column, overflow="fold")
    newest_job = {job.run: job for job in reversed(jobs)}  # jobs are sorted, the newest first
    for run in runs:
        cells = [
            run.run,
            run.parent.tags.get(Tag.RECIPE, ""),
            run.parent.status,
            _progress(run),
            _ago(run.measured_s),
        ]
        if with_jobs:
            cells.append(_job_cell(newest_job.pop(run.run, None)))
        table.add_row(*(_plain(cell) for cell in cells))
    # what is left are jobs that pack, and runs that MLflow does not know
    for job in newest_job.values():
        verb = job.command.partition(" ")[0]
        cells = [job.run, "", "", verb, "", _job_cell(job)]
        table.add_row(*(_plain(cell) for cell in cells))
    if table.row_count:
        console.print(table)
        console.print("\nfor one run: python -m jobs status RUN", highlight=False)
    else:
        console.print("no runs yet: begin one with `python -m jobs run RECIPE`", highlight=False)


def _show_run(console: Console, name: str, jobs: list["Job"], address: str) -> None:
    job = jobs[0] if jobs else None
    sweep = find_sweep(tracking_uri(), name)
    if sweep is not None:
        _show_sweep(console, sweep, job, address)
        return
    try:
        run = run_status(tracking_uri(), name)
    except UsageError:
        if job is None:
            raise
        lines = {"run": name, "status": "MLflow does not know it", "job": _job_text(job)}
        _print_lines(console, lines | {"again": _submit_command(job, address)})
        return
    tags = run.parent.tags
    lines = {
        "run": name,
        "recipe": tags.get(Tag.RECIPE, ""),
        "status": run.parent.status,
        "storage": tags.get(Tag.STORAGE, "not recorded"),
    }
    if job is not None:
        lines["job"] = _job_text(job)
    _print_lines(console, lines | {"checkpoint": _checkpoint(run)})
    _show_phases(console, run.phases)
    if run.parent.status == "FINISHED":
        _print_lines(console, {"table": shlex.join(["python", "-m", "jobs", "compare", name])})
        return
    command = _resume_command(run) if job is None else _submit_command(job, address)
    _print_lines(console, _next_commands(command, name, job, address))


def _show_sweep(console: Console, sweep: SweepResult, job: "Job | None", address: str) -> None:
    # imported late: the checks of a sweep need torch
    from jobs.verbs.sweep import best_lines

    lines = {"sweep": sweep.sweep, "recipe": sweep.recipe, "status": sweep.status}
    if job is not None:
        lines["job"] = _job_text(job)
    _print_lines(console, lines)
    print_section(console, sweep_section(sweep))
    console.print()
    _print_lines(console, best_lines(sweep))
    if sweep.status == "FINISHED":
        return
    command = _sweep_command(sweep) if job is None else _submit_command(job, address)
    _print_lines(console, _next_commands(command, sweep.sweep, job, address))


def _next_commands(command: str, run: str, job: "Job | None", address: str) -> dict[str, str]:
    """Commands that follow and stop a running job, or the one that resumes the run."""
    if job is None or job.ended:
        return {"resume": command}
    return {
        "follow": command,
        "stop": shlex.join(["python", "-m", "jobs", "stop", run, "--address", address]),
    }


def _show_phases(console: Console, phases: tuple[RunFacts, ...]) -> None:
    if not phases:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("phase", "status", "step", "last metric", "starts", "error"):
        table.add_column(column, overflow="fold")
    for phase in phases:
        step = max(phase.steps.values(), default="")
        attempts = (
            int(value) for name, value in phase.tags.items() if name.startswith(Tag.ATTEMPT_PREFIX)
        )
        cells = [
            phase.name,
            phase.status,
            str(step),
            _ago(phase.measured_s),
            str(sum(attempts) or ""),
            phase.tags.get(Tag.ERROR, ""),
        ]
        table.add_row(*(_plain(cell) for cell in cells))
    console.print()
    console.print(table)
    console.print()


def _checkpoint(run: RunStatus) -> str:
    storage = run.parent.tags.get(Tag.STORAGE)
    if not storage:  # runs of older versions do not have the tag
        return "unknown"
    try:
        return newest_complete(join_url(storage, "pretrain", "checkpoints")) or "none yet"
    except HemocoError as error:
        return str(error)


def _resume_command(run: RunStatus) -> str:
    """The command that resumes a run which is not a job, as far as MLflow has it recorded."""
    tags = run.parent.tags
    verb = tags.get(Tag.VERB, "")
    backbone = tags.get(Tag.BACKBONE_URL, "")
    storage = tags.get(Tag.STORAGE, "")
    if verb == "demo":
        return "not possible, its storage ended with it; python -m jobs demo begins another"
    if verb == "sweep":  # the run is a trial
        sweep = find_sweep(tracking_uri(), run.run.rpartition("/")[0])
        return "the command that began its sweep" if sweep is None else _sweep_command(sweep)
    command = recorded_command(tags, run.parent.params)
    # a transfer without a backbone ended before it had read one
    if command is None or (verb == "transfer" and not backbone):
        return _unknown_command(run.run)
    argv = [verb or "run", command.recipe]
    if backbone:
        only = ["--only", *command.only] if command.only else []
        argv = ["transfer", command.recipe, "--backbone", backbone, *only]
    argv += [*command.flags(), "--run", run.run]
    if storage:
        argv += ["--storage", storage.removesuffix(f"/{run.run}")]
    return shlex.join(["python", "-m", "jobs", *argv])


def _sweep_command(sweep: SweepResult) -> str:
    """The command that resumes a sweep, with as many trials as were requested in the end."""
    command = recorded_command(sweep.tags, sweep.params)
    if command is None:
        return _unknown_command(sweep.sweep)
    # The params have the number of the first command, and each requested trial is opened. The last
    # command may have requested more and ended before it opened them.
    requested = command.settings.get("sweep.trials", "")
    trials = max(
        int(sweep.params["sweep.trials"]),
        len(sweep.trials),
        int(requested) if requested.isdecimal() else 0,
    )
    settings = settings_flags(command.settings | {"sweep.trials": str(trials)})
    argv = ["sweep", command.recipe, *settings, "--run", sweep.sweep]
    if sweep.storage:
        argv += ["--storage", sweep.storage.removesuffix(f"/{sweep.sweep}")]
    return shlex.join(["python", "-m", "jobs", *argv])


def _unknown_command(run: str) -> str:
    return f"the command that began it, with {shlex.join(['--run', run])}"


def _submit_command(job: "Job", address: str) -> str:
    argv = resuming_argv(shlex.split(job.command))
    return shlex.join(["python", "-m", "jobs", "submit", *argv, "--address", address])


def _progress(run: RunStatus) -> str:
    """The step of the pretraining, or how many transfers or trials are done."""
    if run.is_sweep:
        return _counted("trials", run.phases, _UNDONE | {"KILLED": "stopped"})
    # `NAME@EPOCH` is a transfer of the curve, measured while the pretraining runs
    transfers = [
        phase for phase in run.phases if phase.name != "pretrain" and "@" not in phase.name
    ]
    if transfers:
        return _counted("transfers", transfers, _UNDONE)
    for phase in run.phases:
        if phase.name == "pretrain":
            step = max(phase.steps.values(), default=0)
            return f"pretrain, step {step}" if step else "pretrain"
    return ""


def _counted(what: str, phases: Sequence[RunFacts], undone: dict[str, str]) -> str:
    """Counts the phases that are done, and those that have one of the statuses in `undone`."""
    counts = Counter(phase.status for phase in phases)
    parts = [f"{what}, {counts['FINISHED']} of {len(phases)} done"]
    parts += [f"{counts[status]} {word}" for status, word in undone.items() if counts[status]]
    return ", ".join(parts)


def _print_lines(console: Console, lines: dict[str, str]) -> None:
    for name, text in lines.items():
        console.print(_plain(f"{name:<12}{text}"), soft_wrap=True)


def _job_text(job: "Job") -> str:
    text = f"{job.id} {job.status}"
    if job.exit_status:
        text += f" with exit status {job.exit_status}"
    if job.commit:
        text += f", commit {job.commit}"
    return text


def _job_cell(job: "Job | None") -> str:
    return f"{job.id} {job.status}" if job else ""


def _ago(moment: float | None) -> str:
    if moment is None:
        return ""
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _plain(text: str) -> Text:
    """Text that rich prints unchanged: brackets in a name are not markup."""
    return Text(text)
