"""`python -m jobs stop RUN --address URL`: stops a submitted run, which can be resumed."""

import shlex

from cluster.submit.environment import resuming_argv
from hemoco.errors import UsageError
from hemoco.names import check_run_name
from hemoco.results.status import close_running
from hemoco.tracking.client import connect, tracking_uri
from jobs.arguments import Run, Url, read_arguments
from jobs.verbs.submit import head_address, in_mlflow


def main(argv: list[str]) -> None:
    """Stops the run."""
    read_arguments(stop, argv, command="stop")


def stop(run: Run, /, *, address: Url = "") -> None:
    """Stops the job of a submitted run.

    Submitting the same command again resumes the run from its last checkpoint.

    Args:
        run: name of the run.
        address: dashboard of the cluster's head, http://head:8265; default: $RAY_ADDRESS if it is
            one.
    """
    check_run_name("RUN", run)
    address = head_address(address)
    uri = tracking_uri()
    if in_mlflow(run):
        connect(uri)  # an MLflow that does not answer is reported before anything is stopped
    # imported late: Ray takes seconds, and wrong usage is reported at once
    from cluster.submit.client import Cluster

    cluster = Cluster(address)
    running = next((job for job in cluster.jobs(run) if not job.ended), None)
    if running is not None:
        print(f"stopping    job {running.id}", flush=True)
    job = cluster.stop(run)
    if job is None:
        names = dict.fromkeys(each.run for each in cluster.jobs() if not each.ended)
        raise UsageError(
            f"run {run!r} has no job on {address}; runs with an active job: "
            f"{', '.join(names) or 'none'}"
        )
    print(f"{'had ended' if running is None else 'stopped':<12}job {job.id}: {job.status}")
    if in_mlflow(run):
        for phase in close_running(uri, run):
            print(f"MLflow      {phase}: RUNNING -> KILLED")
    argv = ["submit", *resuming_argv(shlex.split(job.command)), "--address", address]
    print(f"resume      {shlex.join(['python', '-m', 'jobs', *argv])}")
