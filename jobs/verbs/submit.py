"""`python -m jobs submit VERB ... --address URL`: runs a verb on a cluster as a Ray job."""

import argparse
import functools
import hashlib
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.submit.checkout import CHECKOUT, upload_problems, uploaded_files
from cluster.submit.environment import job_spec, resuming_argv
from hemoco.config import Recipe, init_url
from hemoco.errors import HemocoError, StorageError, TrackingError, UsageError
from jobs.arguments import read_arguments
from jobs.options import (
    ReportOptions,
    RunOptions,
    SweepOptions,
    TransferOptions,
    absolute_recipe,
    run_name,
    typed_options,
)

if TYPE_CHECKING:
    from cluster.submit.client import Cluster, Job

_OPTIONS: dict[str, type[RunOptions]] = {
    "run": ReportOptions,
    "pretrain": RunOptions,
    "transfer": TransferOptions,
    "sweep": SweepOptions,
    "preflight": RunOptions,
}
"""Verbs that take a recipe, with the options of each."""
_VERBS = ("run", "pretrain", "transfer", "sweep", "pack", "preflight")
_NOT_IN_MLFLOW = ("pack", "preflight")
_USAGE = f"""\
usage: python -m jobs submit VERB ... [--address URL] [--detach]

Runs a verb on a cluster as a Ray job, with the same arguments as on this machine.
VERB is one of {", ".join(_VERBS)}.

This checkout is uploaded; the nodes have the dependencies and the credentials. Before anything is
uploaded, the recipe is checked against its data from this machine; `submit preflight` checks the
rest from inside the cluster.

The log is followed, and the command ends with the exit status of the job. Ctrl-C leaves the job
running. The same command follows a job that is running, and resumes a run whose job has ended.

  --address URL  dashboard of the cluster's head, http://head:8265; default: $RAY_ADDRESS if it is
                 one
  --detach       do not follow the log"""


class Request(NamedTuple):
    """A command to submit."""

    run: str
    argv: list[str]
    """The verb and its arguments as they are sent."""
    recipe_file: Path | None
    """The file of a recipe that was given by its path."""
    recipe: Recipe | None
    """With its values as they were typed; None for `pack`."""


def main(argv: list[str]) -> None:
    """Submits a job, or joins the one that is running, and follows its log."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        raise SystemExit(0 if argv else 2)
    # argparse, because the arguments of the verb pass through unread
    parser = argparse.ArgumentParser(
        prog="python -m jobs submit",
        usage=_USAGE.removeprefix("usage: "),
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--address", default="")
    parser.add_argument("--detach", action="store_true")
    own, verb_argv = parser.parse_known_args(argv)
    request = parse_request(verb_argv)
    address = head_address(own.address)
    problems = upload_problems(CHECKOUT, request.recipe_file)
    if problems:
        raise UsageError("; ".join(problems))
    spec = job_spec(address, request.run, request.argv, CHECKOUT)
    # imported late: Ray takes seconds, and wrong usage is reported at once
    from cluster.submit.client import Cluster

    cluster = Cluster(address)
    # a running job is only followed: whether its recipe fits its data does not matter then
    if all(job.ended for job in cluster.jobs(request.run)):
        check_here(request)
    job, is_new = cluster.submit(spec)
    follow_command = shlex.join(
        ["python", "-m", "jobs", "submit", *resuming_argv(verb_argv), "--address", address]
    )
    _announce(job, is_new, address, request)
    if own.detach:
        print(f"follow      {follow_command}\nstop        {_stop_command(job, address)}")
        return
    _follow(cluster, job, follow_command)


def head_address(given: str) -> str:
    """Returns the address of the head: `--address`, or RAY_ADDRESS.

    Raises:
        UsageError: neither is the URL of a dashboard.
    """
    address = given or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        problem = "--address is missing, and RAY_ADDRESS is not the URL of a dashboard"
        if given:
            problem = f"--address is {given}"
        raise UsageError(
            f"{problem}: give the dashboard of the cluster's head, for example "
            "--address http://head:8265"
        )
    return address.rstrip("/")


def parse_request(argv: list[str]) -> Request:
    """Reads a verb and its arguments as the verb itself will, and prepares them for the cluster.

    Raises:
        UsageError: the arguments are wrong, or have a meaning on this machine only.
        SystemExit: 2 for a misspelt flag, 0 after --help.
    """
    verb = argv[0] if argv else ""
    if verb not in _VERBS:
        raise UsageError(
            f"submit {verb or '(nothing)'}: these verbs run on a cluster: {', '.join(_VERBS)}"
        )
    if verb == "pack":
        return _parse_pack(argv[1:])
    return _parse_recipe_verb(verb, argv[1:])


def check_here(request: Request) -> None:
    """Checks the recipe against its data before anything is uploaded.

    Prints a line instead of failing if the data cannot be read from this machine: the nodes may
    reach more than it does.

    Raises:
        UsageError: the recipe names no shards.
        ShardError: the shards or the splits that it names do not exist.
        ConfigError: the recipe does not fit its data.
    """
    verb, recipe = request.argv[0], request.recipe
    if recipe is None or verb == "preflight":  # preflight does these checks on the cluster
        return
    # imported late: torch takes seconds
    from hemoco.data.shards.index import ShardIndexes
    from jobs.verbs.sweep import check_sweep
    from pipeline.checks import check_pretraining, check_transfers

    indexes = ShardIndexes()
    try:
        _check_folders(recipe)
        recipe = absolute_recipe(recipe)
        if verb == "sweep":
            check_sweep(recipe, indexes)
            return
        if verb != "transfer":
            check_pretraining(recipe, indexes)
        if verb != "pretrain":
            check_transfers(recipe, indexes)
    except (StorageError, TrackingError) as error:
        print(
            "unchecked   whether the recipe fits its data, which cannot be read from this machine: "
            f"{error}",
            flush=True,
        )


def _check_folders(recipe: Recipe) -> None:
    """Raises StorageError if shards are in a folder that this machine does not have.

    Without this, the missing folder would be reported as one without shards, which fails the
    command although the nodes may share such a folder.
    """
    for data in (recipe.data, *(transfer.data for transfer in recipe.transfers.values())):
        folder = data.shards.removeprefix("file://")
        if folder.startswith("/") and not Path(folder).is_dir():
            raise StorageError(f"{data.shards}: no such folder on this machine")


def in_mlflow(run: str) -> bool:
    """Returns whether a job's run can be in MLflow: those of pack and preflight never are."""
    return not run.startswith(tuple(f"{verb}-" for verb in _NOT_IN_MLFLOW))


def _parse_recipe_verb(verb: str, argv: list[str]) -> Request:
    # not `parse_options`: a path may mean something else on the cluster, where the verb itself
    # turns it into a URL
    options = typed_options(verb, argv, _OPTIONS[verb])
    run = run_name(options)
    _check_locations(options)
    if verb != "preflight" and not options.recipe.data.shards:
        raise UsageError("--data.shards is missing: name the URL that `python -m jobs pack` wrote")
    file = Path(argv[0]) if argv[0].endswith(".py") else None
    # `upload_problems` refuses a file outside the checkout
    recipe = os.path.relpath(file.resolve(), CHECKOUT) if file else argv[0]
    sent = [verb, recipe, *argv[1:]]
    if verb == "preflight":
        # a name of its own: it may be submitted while the run's own job is running
        return Request(_digest_name(verb, sent), sent, file, options.recipe)
    if not options.run:
        sent += ["--run", run]
    return Request(run, sent, file, options.recipe)


def _parse_pack(argv: list[str]) -> Request:
    from jobs.verbs.pack import pack

    @functools.wraps(pack)  # reads the command line of `pack` without packing
    def paths_of_pack(*paths: Any, **options: Any) -> Any:
        return paths[0]

    paths: tuple[str, ...] = read_arguments(paths_of_pack, argv, command="pack")
    if len(paths) < 2:
        raise UsageError(
            "pack needs a SOURCE and a DEST: python -m jobs submit pack SOURCE [SOURCE ...] DEST"
        )
    for path in paths:
        _check_location("pack", path)
    return Request(_digest_name("pack", argv), ["pack", *argv], None, None)


def _digest_name(verb: str, argv: list[str]) -> str:
    return f"{verb}-{hashlib.sha256(shlex.join(argv).encode()).hexdigest()[:8]}"


def _check_locations(options: RunOptions) -> None:
    """Refuses locations that mean nothing on another machine, or would be lost with it."""
    recipe = options.recipe
    if not options.storage:
        raise UsageError(
            "--storage is missing: checkpoints on a node's own disk are lost with it; name an "
            "s3:// URL"
        )
    if isinstance(options, ReportOptions) and options.out:
        raise UsageError(
            "--out would be a folder of the cluster: leave it out; MLflow has a sweep's results, "
            "and those of a run go to a folder here by python -m jobs compare RUN --out DIR"
        )
    _check_location("--storage", options.storage)
    _check_location("--data.shards", recipe.data.shards)
    if isinstance(options, TransferOptions):
        _check_location("--backbone", options.backbone)
    for name, transfer in recipe.transfers.items():
        _check_location(f"--transfers.{name}.data.shards", transfer.data.shards)
        for init in transfer.inits:
            _check_location(f"--transfers.{name}.inits", init_url(init))


def _check_location(name: str, location: str) -> None:
    is_url = re.match(r"[a-z0-9+]+:", location)
    if location and not is_url and not location.startswith("/"):
        raise UsageError(
            f"{name}: {location} is a path below this folder, which the cluster does not see: give "
            "an s3:// URL, or the absolute path of a folder that all its nodes share"
        )


def _announce(job: "Job", is_new: bool, address: str, request: Request) -> None:
    commit = job.commit or "unknown"
    print(f"run         {job.run}")
    if is_new:
        files = uploaded_files(CHECKOUT)
        megabytes = sum(files.values()) / 1e6
        print(f"upload      {len(files)} files, {megabytes:.1f} MB, commit {commit}")
        if request.argv[0] != "pack" and not os.environ.get("MLFLOW_TRACKING_URI"):
            print(
                "MLflow      MLFLOW_TRACKING_URI is not set here: the job uses that of the nodes' "
                "environment"
            )
    else:
        age_min = (time.time() - job.started) / 60
        print(f"joined      a job that began {age_min:.0f} min ago with commit {commit};")
        print("            later changes of this checkout are not in it")
        if "--fresh" in request.argv:
            stop = _stop_command(job, address)
            print(f"--fresh     has no effect on a running job; first run {stop}")
    print(f"job         {job.id} on {address}", flush=True)


def _follow(cluster: "Cluster", job: "Job", follow_command: str) -> None:
    """Prints the job's log until it ends.

    Raises:
        HemocoError: the job failed or was stopped, or its cluster does not answer any more.
        UsageError: the job ended with exit status 2.
        SystemExit: 1 after Ctrl-C.
    """
    from cluster.submit.client import HeadLost
    from cluster.submit.log import follow

    began = time.monotonic()
    print("log         follows; Ctrl-C leaves the job running", flush=True)
    try:
        done = follow(cluster, job.id, _write)
    except KeyboardInterrupt:
        print(
            "\ndetached    the job is still running\n"
            f"follow      {follow_command}\n"
            f"stop        {_stop_command(job, cluster.address)}"
        )
        raise SystemExit(1) from None
    except HeadLost as error:
        raise HemocoError(
            f"lost the cluster of job {job.id} ({error}); if its head has ended, so has the job; "
            f"once the cluster is up, resume by: {follow_command}"
        ) from error
    if done.status == "SUCCEEDED":
        print(f"job         {job.id} done after {(time.monotonic() - began) / 60:.1f} min")
        verb = done.command.partition(" ")[0]
        if verb not in _NOT_IN_MLFLOW:
            show = "status" if verb == "sweep" else "compare"
            print(f"table       {shlex.join(['python', '-m', 'jobs', show, job.run])}")
        return
    if done.status == "STOPPED":
        raise HemocoError(f"job {job.id} was stopped; resume it by: {follow_command}")
    if done.exit_status is None:
        raise HemocoError(f"job {job.id} did not start: {done.message.strip()[-500:]}")
    kind = UsageError if done.exit_status == 2 else HemocoError
    raise kind(f"job {job.id} failed with exit status {done.exit_status}: the log above shows why")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _stop_command(job: "Job", address: str) -> str:
    return shlex.join(["python", "-m", "jobs", "stop", job.run, "--address", address])
