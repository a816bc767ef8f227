"""Jobs of a Ray cluster, over the HTTP address of its head: submit, join, stop.

The metadata `hemoco.run` of a job names its run. A run has one job at a time. Importing this module
takes seconds.
"""

import dataclasses
import itertools
import logging
import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.submit.checkout import EXCLUDES
from cluster.submit.environment import JobSpec, resuming_argv
from hemoco.errors import HemocoError, UsageError, last_line
from hemoco.tracking.tags import Tag

_TIMEOUTS_S = (5.0, 60.0)  # to connect, and for an answer
_OTHER_SERVER = "is not the dashboard of a Ray cluster: correct --address (http://head:8265)"
_STOP_WAIT_S = 120.0  # longer than the 60 s that a job has after SIGTERM
_POLL_S = 0.5
# exec replaces Ray's shell. Otherwise SIGTERM ends the shell first, and the head waits the full
# stop time for the command, whose process nobody reaps.
_ENTRYPOINT = "exec python -m jobs "
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


class HeadLost(HemocoError):
    """The head of the cluster does not answer, or what answers is not a dashboard."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the cluster describes it."""

    id: str
    run: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    command: str
    """The command line after `python -m jobs`, quoted for a shell."""
    commit: str
    """Commit from which it was submitted, with `-dirty` if there were changes; empty if unknown."""
    message: str
    exit_status: int | None
    """Exit status of its process; None if it is running or was killed."""
    started: float
    """Time when it began, in seconds since 1970."""

    @property
    def ended(self) -> bool:
        """True if it has stopped, succeeded or failed."""
        return self.status in _ENDED


class Cluster:
    """The job server of a cluster.

    Args:
        address: http(s)://host:port of the head's dashboard.

    Raises:
        UsageError: the address is of another kind.
        HemocoError: nothing answers there, what answers is not a Ray dashboard, or the token is
            missing or wrong.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UsageError(
                f"--address is {parts.scheme}://{parts.netloc.rpartition('@')[2]}: give the "
                "dashboard of the cluster's head, for example http://head:8265"
            )
        # Ray prefers RAY_ADDRESS to the address it is given, but not to this variable
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._answering():
            self.client: Any = _Client(self.address)

    def jobs(self, run: str = "") -> list[Job]:
        """Lists hemoco's jobs, of one run or of all, the newest first."""
        with self._answering():
            listed = self.client.list_jobs()
        jobs = [_job(details) for details in listed if Tag.RUN in (details.metadata or {})]
        chosen = (job for job in jobs if run in ("", job.run))
        return sorted(chosen, key=lambda job: job.started, reverse=True)

    def job(self, job_id: str) -> Job:
        """Returns a job by its id.

        Raises:
            HeadLost: the cluster does not answer, or does not know it.
        """
        with self._answering():
            return _job(self.client.get_job_info(job_id))

    def log(self, job_id: str) -> str:
        """Returns everything that a job has printed so far.

        Raises:
            HeadLost: the cluster does not answer, or does not know the job.
        """
        with self._answering():
            return str(self.client.get_job_logs(job_id))

    def submit(self, spec: JobSpec) -> tuple[Job, bool]:
        """Starts a job for a run, or joins the running one with the same command.

        Returns:
            The job, and whether it is new.

        Raises:
            UsageError: a job of the run is running with another command.
        """
        for attempt in itertools.count():
            known = self.jobs(spec.run)
            if known and not known[0].ended:
                return _joined(known[0], spec), False
            job_id = f"{re.sub(r'[^A-Za-z0-9._-]', '-', spec.run)}-{len(known) + 1 + attempt}"
            try:
                return self._start(job_id, spec), True
            except HeadLost:
                # the first time, the id may be taken: another process submitted at the same moment
                if attempt:
                    raise
        raise AssertionError("the loop returns or raises")

    def stop(self, run: str) -> Job | None:
        """Ends a run's job by SIGTERM and waits until it has ended.

        Returns:
            The run's last job, which may have ended before; None if the cluster knows none.

        Raises:
            HemocoError: the job does not end.
        """
        known = self.jobs(run)
        running = [job for job in known if not job.ended]
        if not running:
            return known[0] if known else None
        with self._answering():
            self.client.stop_job(running[0].id)
        deadline = time.monotonic() + _STOP_WAIT_S
        while not (job := self.job(running[0].id)).ended:
            if time.monotonic() > deadline:
                raise HemocoError(
                    f"job {job.id} is still running {_STOP_WAIT_S:.0f} s after SIGTERM: look at "
                    f"its log, then run `ray job stop {job.id} --address {self.address}`"
                )
            time.sleep(_POLL_S)
        return job

    def _start(self, job_id: str, spec: JobSpec) -> Job:
        runtime_env = {
            "working_dir": str(spec.checkout),
            "excludes": list(EXCLUDES),
            "env_vars": spec.variables,
        }
        with self._answering():
            self.client.submit_job(
                entrypoint=_ENTRYPOINT + shlex.join(spec.argv),
                submission_id=job_id,
                runtime_env=runtime_env,
                metadata={Tag.RUN: spec.run, Tag.COMMIT: spec.commit},
            )
        return self.job(job_id)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turns the errors of Ray's client into one line of advice."""
        try:
            yield
        except AuthenticationError as error:
            raise _refused(self.address, str(error)) from error
        except (ConnectionError, requests.exceptions.RequestException, OSError) as error:
            if isinstance(error, requests.exceptions.ReadTimeout):
                problem = f"takes connections but has not answered within {_TIMEOUTS_S[1]:.0f} s"
            elif isinstance(error, ConnectionError | requests.exceptions.ConnectionError):
                problem = (
                    "does not answer: start the cluster, or correct --address (http://head:8265)"
                )
            else:
                problem = _OTHER_SERVER
            raise HeadLost(f"{self.address} {problem}") from error
        except (RuntimeError, ValueError, KeyError) as error:
            if "Version check returned 404" in str(error):
                raise HeadLost(f"{self.address} {_OTHER_SERVER}") from error
            raise HeadLost(f"{self.address}: {last_line(error)}") from error


# mypy does not follow ray's annotations
class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with time-outs; without, it waits for ever for a head that was switched off."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_TIMEOUTS_S, **options)


def _joined(job: Job, spec: JobSpec) -> Job:
    # --fresh does not count: with and without, the job works on this run
    if resuming_argv(shlex.split(job.command)) != resuming_argv(spec.argv):
        stop = shlex.join(["python", "-m", "jobs", "stop", job.run, "--address", spec.address])
        raise UsageError(
            f"job {job.id} works on run {job.run!r} with another command ({job.command}): stop it "
            f"first ({stop}), or choose another --run name"
        )
    return job


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id,
        run=metadata.get(Tag.RUN, ""),
        status=str(details.status),
        command=details.entrypoint.removeprefix(_ENTRYPOINT),
        commit=metadata.get(Tag.COMMIT, ""),
        message=details.message or "",
        exit_status=details.driver_exit_code,
        started=(details.start_time or 0) / 1000,
    )


def _refused(address: str, reason: str) -> HemocoError:
    if "Authentication required" in reason:
        return HemocoError(
            f"{address} requires a token (401) and none was sent: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to a file with the token of this cluster"
        )
    if "Authentication failed" in reason:
        return HemocoError(
            f"{address} does not accept this token (403): it is that of another cluster; correct "
            "the file that RAY_AUTH_TOKEN_PATH names, or RAY_AUTH_TOKEN"
        )
    return HemocoError(
        f"{address}: {reason.strip().splitlines()[0]}; check RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH"
    )
