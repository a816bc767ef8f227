"""`python -m jobs stop RUN --address URL`: ends a submitted run; the same words resume it."""

import shlex
from typing import Annotated

import tyro

from cluster.submit.environment import words_again
from hemoco.errors import UsageError
from hemoco.names import check_run_name
from hemoco.results.status import close_running
from hemoco.tracking.client import connect, tracking_uri
from jobs.verbs.submit import head_address, in_mlflow


def main(argv: list[str]) -> None:
    """Stops."""
    tyro.cli(stop, args=argv, prog="python -m jobs stop", use_underscores=True)


def stop(run: Annotated[str, tyro.conf.Positional], /, *, address: str = "") -> None:
    """Ends a submitted run's job; the same words resume the run from its last checkpoint.

    Args:
        run: the run's name.
        address: dashboard of the cluster's head, http://head:8265; default: $RAY_ADDRESS if it is one.
    """
    check_run_name("RUN", run)
    address = head_address(address)
    uri = tracking_uri()
    if in_mlflow(run):
        connect(uri)  # to learn afterwards that MLflow cannot be told would be too late
    from cluster.submit.client import Cluster  # seconds to import, errors should not wait for it

    cluster = Cluster(address)
    before = next((job for job in cluster.jobs(run) if not job.ended), None)
    if before is not None:
        print(f"stopping    job {before.id}", flush=True)
    job = cluster.stop(run)
    if job is None:
        names = (
            ", ".join(dict.fromkeys(known.run for known in cluster.jobs() if not known.ended))
            or "none"
        )
        raise UsageError(
            f"run {run!r} has no job on {address}; runs with a job that is not ended: {names}"
        )
    print(f"{'stopped' if before else 'had ended':<12}job {job.id}: {job.status}")
    for closed in close_running(uri, run) if in_mlflow(run) else []:
        print(f"MLflow      {closed}: RUNNING -> KILLED")
    words = [
        "python",
        "-m",
        "jobs",
        "submit",
        *words_again(shlex.split(job.words)),
        "--address",
        address,
    ]
    print(f"resume      {shlex.join(words)}")
