"""`python -m jobs submit VERB ... --address URL`: the same words, run on a cluster as a Ray job."""

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

import tyro

from cluster.submit.checkout import CHECKOUT, upload_problems, uploaded_files
from cluster.submit.environment import job_spec, words_again
from hemoco.config import Recipe, init_url
from hemoco.errors import HemocoError, StorageError, TrackingError, UsageError
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
"""Verbs over a recipe, and the options that each reads."""
_VERBS = ("run", "pretrain", "transfer", "sweep", "pack", "preflight")
_NOT_IN_MLFLOW = ("pack", "preflight")
_USAGE = f"""\
usage: python -m jobs submit VERB ... [--address URL] [--detach]

Runs a verb on a cluster as a Ray job: {", ".join(_VERBS)}, with the words one types here. This checkout is
uploaded; the nodes bring the dependencies and the credentials. Before, the recipe is held against its data from here;
`submit preflight` checks all the rest from inside the cluster. Follows the log and ends with the job's exit status;
Ctrl-C leaves the job running. The same words again follow a job that runs, and resume a run whose job has ended.

  --address URL  dashboard of the cluster's head, http://head:8265; default: $RAY_ADDRESS if it is one
  --detach       do not follow the log"""


class Request(NamedTuple):
    """A command line as the cluster gets it."""

    run: str
    words: list[str]
    recipe_file: Path | None
    recipe: Recipe | None
    """As it was typed; None for `pack`."""


def main(argv: list[str]) -> None:
    """Submits, or joins what runs already, and follows."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        raise SystemExit(0 if argv else 2)
    own = argparse.ArgumentParser(
        prog="python -m jobs submit", usage=_USAGE[7:], add_help=False, allow_abbrev=False
    )
    own.add_argument("--address", default="")
    own.add_argument("--detach", action="store_true")
    given, words = own.parse_known_args(argv)
    request = parse_request(words)
    address = head_address(given.address)
    if problems := upload_problems(CHECKOUT, request.recipe_file):
        raise UsageError("; ".join(problems))
    spec = job_spec(address, request.run, request.words, CHECKOUT)
    from cluster.submit.client import Cluster  # seconds to import, errors should not wait for it

    cluster = Cluster(address)
    if all(job.ended for job in cluster.jobs(request.run)):  # to follow a job nothing needs to fit
        check_here(request)
    job, is_new = cluster.submit(spec)
    again = shlex.join(
        ["python", "-m", "jobs", "submit", *words_again(words), "--address", address]
    )
    _announce(job, is_new, address, request)
    if given.detach:
        print(f"follow      {again}\nstop        {_stop_words(job, address)}")
        return
    _follow(cluster, job, again)


def head_address(given: str) -> str:
    """The head's address: what was given, else RAY_ADDRESS.

    Raises:
        UsageError: neither names one.
    """
    address = given or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        where = (
            f"--address is {given}"
            if given
            else "--address is missing, and RAY_ADDRESS names no dashboard"
        )
        raise UsageError(
            f"{where}: name that of the cluster's head, for example --address http://head:8265"
        )
    return address.rstrip("/")


def parse_request(words: list[str]) -> Request:
    """Reads the verb and its words as the verb itself will, and makes them fit another machine.

    Raises:
        UsageError: they are wrong, or mean something on this machine only.
        SystemExit: 2 for a misspelt flag, 0 after --help.
    """
    verb, rest = (words[0], words[1:]) if words else ("", [])
    if verb not in _VERBS:
        raise UsageError(f"submit {verb or '(nothing)'}: on a cluster run {', '.join(_VERBS)}")
    return _parse_pack(rest) if verb == "pack" else _parse_recipe_verb(verb, rest)


def check_here(request: Request) -> None:
    """What the job would fail of on the cluster, found before anything is uploaded; says so where that cannot be.

    Raises:
        UsageError: the recipe names no shards.
        ShardError: there are none, or not the splits it names.
        ConfigError: the recipe does not fit its data.
    """
    verb, recipe = request.words[0], request.recipe
    if recipe is None or verb == "preflight":  # that one checks there
        return
    from hemoco.data.shards.index import ShardIndexes
    from jobs.verbs.sweep import check_sweep  # torch
    from pipeline.checks import check_pretraining, check_transfers

    indexes = ShardIndexes()
    try:
        _look_for_folders(recipe)
        recipe = absolute_recipe(recipe)
        if verb == "sweep":
            return check_sweep(recipe, indexes)
        if verb != "transfer":
            check_pretraining(recipe, indexes)
        if verb != "pretrain":
            check_transfers(recipe, indexes)
    except (StorageError, TrackingError) as error:  # the nodes may reach what this machine does not
        print(
            f"unchecked   whether the recipe fits its data, which cannot be read from here: {error}",
            flush=True,
        )
    return None


def _look_for_folders(recipe: Recipe) -> None:
    """Raises StorageError where shards lie in a folder that the nodes may share but this machine does not see."""
    for data in (recipe.data, *(transfer.data for transfer in recipe.transfers.values())):
        folder = data.shards.removeprefix("file://")
        if folder.startswith("/") and not Path(folder).is_dir():
            raise StorageError(f"{data.shards}: no such folder on this machine")


def in_mlflow(run: str) -> bool:
    """Whether MLflow may know a job's run: not of one that packs or checks."""
    return not run.startswith(tuple(f"{verb}-" for verb in _NOT_IN_MLFLOW))


def _parse_recipe_verb(verb: str, rest: list[str]) -> Request:
    # a path may mean something else on the cluster, where the verb itself will read the command line
    options = typed_options(verb, rest, _OPTIONS[verb])
    run = run_name(options)
    _check_places(options)
    if verb != "preflight" and not options.recipe.data.shards:
        raise UsageError("--data.shards is missing: name the URL that `python -m jobs pack` wrote")
    file = Path(rest[0]) if rest[0].endswith(".py") else None
    # a file outside the checkout is refused by `upload_problems`
    recipe = os.path.relpath(file.resolve(), CHECKOUT) if file else rest[0]
    if verb == "preflight":  # not the run's name: it may be asked for beside that one's job
        words = [verb, recipe, *rest[1:]]
        return Request(_digest_name(verb, words), words, file, options.recipe)
    named = [] if options.run else ["--run", run]
    return Request(run, [verb, recipe, *rest[1:], *named], file, options.recipe)


def _parse_pack(rest: list[str]) -> Request:
    from jobs.verbs.pack import pack

    @functools.wraps(pack)  # its command line, but not what it does
    def words_of_pack(*paths: Any, **options: Any) -> Any:
        return paths[0]

    paths: tuple[str, ...] = tyro.cli(
        words_of_pack, args=rest, prog="python -m jobs pack", use_underscores=True
    )
    if len(paths) < 2:
        raise UsageError(
            "pack needs a SOURCE and a DEST: python -m jobs submit pack SOURCE [SOURCE ...] DEST"
        )
    for path in paths:
        _check_place("pack", path)
    return Request(_digest_name("pack", rest), ["pack", *rest], None, None)


def _digest_name(verb: str, words: list[str]) -> str:
    return f"{verb}-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}"


def _check_places(options: RunOptions) -> None:
    """Refuses what means nothing on another machine, or would be lost with it."""
    recipe = options.recipe
    if not options.storage:
        raise UsageError(
            "--storage is missing: checkpoints on a node's own disk are lost with it; name an s3:// URL"
        )
    if isinstance(options, ReportOptions) and options.out:
        raise UsageError(
            "--out would be a folder of the cluster: leave it out; MLflow has a sweep's results, and those of a run go "
            "to a folder here by python -m jobs compare RUN --out DIR"
        )
    places = {"--storage": options.storage, "--data.shards": recipe.data.shards}
    if isinstance(options, TransferOptions):
        places["--backbone"] = options.backbone
    for name, transfer in recipe.transfers.items():
        places[f"--transfers.{name}.data.shards"] = transfer.data.shards
        places |= {f"--transfers.{name}.inits": url for url in map(init_url, transfer.inits) if url}
    for name, place in places.items():
        _check_place(name, place)


def _check_place(name: str, place: str) -> None:
    if place and not re.match(r"[a-z0-9+]+:", place) and not place.startswith("/"):
        raise UsageError(
            f"{name}: {place} is a path below this folder, which the cluster does not see: give an s3:// URL, or the "
            "absolute path of a folder that all its nodes share"
        )


def _announce(job: "Job", is_new: bool, address: str, request: Request) -> None:
    print(f"run         {job.run}")
    if is_new:
        files = uploaded_files(CHECKOUT)
        print(
            f"upload      {len(files)} files, {sum(files.values()) / 1e6:.1f} MB, commit {job.commit or 'unknown'}"
        )
        if request.words[0] != "pack" and not os.environ.get("MLFLOW_TRACKING_URI"):
            print(
                "MLflow      MLFLOW_TRACKING_URI is not set here: the job uses that of the nodes' environment"
            )
    else:
        age = (time.time() - job.started) / 60
        print(
            f"joined      a job that began {age:.0f} min ago with commit {job.commit or 'unknown'}; what this checkout"
        )
        print("            has become since is not in it")
        if "--fresh" in request.words:
            print(
                f"--fresh     is not done to a job that runs; first say {_stop_words(job, address)}"
            )
    print(f"job         {job.id} on {address}", flush=True)


def _follow(cluster: "Cluster", job: "Job", again: str) -> None:
    from cluster.submit.client import HeadLost
    from cluster.submit.log import follow

    began = time.monotonic()
    print("log         follows; Ctrl-C leaves the job running", flush=True)
    try:
        done = follow(cluster, job.id, _show)
    except KeyboardInterrupt:
        print(
            f"\ndetached    the job goes on\nfollow      {again}\nstop        {_stop_words(job, cluster.address)}"
        )
        raise SystemExit(1) from None
    except HeadLost as error:
        raise HemocoError(
            f"lost the cluster of job {job.id} ({error}); if the head has gone, so has the job; when a cluster is "
            f"there, go on: {again}"
        ) from error
    if done.status == "SUCCEEDED":
        print(f"job         {job.id} done after {(time.monotonic() - began) / 60:.1f} min")
        if done.words.split(" ")[0] not in _NOT_IN_MLFLOW:
            print(f"table       {_table_words(job)}")
        return
    if done.status == "STOPPED":
        raise HemocoError(f"job {job.id} was stopped; go on: {again}")
    if done.exit_status is None:
        raise HemocoError(f"job {job.id} did not start: {done.message.strip()[-500:]}")
    kind = UsageError if done.exit_status == 2 else HemocoError
    raise kind(f"job {job.id} failed with exit status {done.exit_status}: the log above says why")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _table_words(job: "Job") -> str:
    verb = "status" if job.words.startswith("sweep ") else "compare"
    return shlex.join(["python", "-m", "jobs", verb, job.run])


def _stop_words(job: "Job", address: str) -> str:
    return shlex.join(["python", "-m", "jobs", "stop", job.run, "--address", address])
