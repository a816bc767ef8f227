"""Jobs of a Ray cluster: submitted, joined, followed, stopped, over the HTTP address of its head.

A job belongs to a run by its metadata `hemoco.run`, and a run has one job at a time. Importing this takes seconds.
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
from cluster.submit.environment import JobSpec, words_again
from hemoco.errors import HemocoError, UsageError
from hemoco.tracking.tags import Tag

_TIMEOUTS_S = (5.0, 60.0)  # to connect, and for an answer
_OTHER_SERVER = "is not the dashboard of a Ray cluster: correct --address (http://head:8265)"
_STOP_WAIT_S = 120.0  # longer than a job may take to end in order
_POLL_S = 0.5
# exec: a shell would end first, and the head then wait its full time for an orphan that nobody reaps
_ENTRYPOINT = "exec python -m jobs "
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


class HeadLost(HemocoError):
    """The head of the cluster does not answer, or answers as no dashboard does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the cluster knows of a job."""

    id: str
    run: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    words: str
    """The command line after `python -m jobs`, as a shell reads it."""
    commit: str
    """Of the checkout it was submitted from, with `-dirty` where that had changes; empty if unknown."""
    message: str
    exit_status: int | None
    """Of its process, if that has ended by itself."""
    started: float
    """Seconds since 1970."""

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in _ENDED


class Cluster:
    """The job server of a cluster.

    Args:
        address: http(s)://host:port of the head's dashboard.

    Raises:
        UsageError: the address is of another kind.
        HemocoError: nothing answers there, it is no Ray dashboard, or the token is missing or wrong.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UsageError(
                f"--address is {parts.scheme}://{parts.netloc.rpartition('@')[2]}: give the dashboard of the "
                "cluster's head, for example http://head:8265"
            )
        os.environ["RAY_API_SERVER_ADDRESS"] = (
            self.address
        )  # Ray would prefer RAY_ADDRESS to what it is given
        for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._answering():
            self.client: Any = _Client(self.address)

    def jobs(self, run: str = "") -> list[Job]:
        """hemoco's jobs, of one run or of all, the newest first."""
        with self._answering():
            found = [
                _job(details)
                for details in self.client.list_jobs()
                if Tag.RUN in (details.metadata or {})
            ]
        mine = (job for job in found if run in ("", job.run))
        return sorted(mine, key=lambda job: job.started, reverse=True)

    def job(self, job_id: str) -> Job:
        """A job by its id.

        Raises:
            HeadLost: the cluster does not answer, or does not know it.
        """
        with self._answering():
            return _job(self.client.get_job_info(job_id))

    def log(self, job_id: str) -> str:
        """All that a job has printed so far.

        Raises:
            HeadLost: the cluster does not answer, or does not know the job.
        """
        with self._answering():
            return str(self.client.get_job_logs(job_id))

    def submit(self, spec: JobSpec) -> tuple[Job, bool]:
        """Starts a job for a run, or finds the one that does the same at this moment.

        Returns:
            The job, and whether it is new.

        Raises:
            UsageError: the run does something else at this moment.
        """
        for attempt in itertools.count():
            known = self.jobs(spec.run)
            if known and not known[0].ended:
                return _joined(known[0], spec), False
            job_id = f"{re.sub(r'[^A-Za-z0-9._-]', '-', spec.run)}-{len(known) + 1 + attempt}"
            try:
                return self._start(job_id, spec), True
            except HeadLost:
                if attempt:  # the first time somebody else may have submitted in the same moment
                    raise
        raise AssertionError("endless")

    def stop(self, run: str) -> Job | None:
        """Ends a run's job by SIGTERM and waits until it has ended.

        Returns:
            The run's last job, if the cluster knows one; it need not have been running.

        Raises:
            HemocoError: it does not end.
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
                    f"job {job.id} still runs {_STOP_WAIT_S:.0f} s after it was told to stop: look at its log, "
                    f"then say `ray job stop {job.id} --address {self.address}`"
                )
            time.sleep(_POLL_S)
        return job

    def _start(self, job_id: str, spec: JobSpec) -> Job:
        with self._answering():
            self.client.submit_job(
                entrypoint=_ENTRYPOINT + shlex.join(spec.words),
                submission_id=job_id,
                runtime_env={
                    "working_dir": str(spec.checkout),
                    "excludes": list(EXCLUDES),
                    "env_vars": spec.variables,
                },
                metadata={Tag.RUN: spec.run, Tag.COMMIT: spec.commit},
            )
        return self.job(job_id)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turns what Ray's client raises into one line that says what to do."""
        try:
            yield
        except AuthenticationError as error:
            raise _refused(self.address, str(error)) from error
        except (ConnectionError, requests.exceptions.RequestException, OSError) as error:
            if isinstance(error, requests.exceptions.ReadTimeout):
                what = f"takes connections but has not answered within {_TIMEOUTS_S[1]:.0f} s"
            elif isinstance(error, ConnectionError | requests.exceptions.ConnectionError):
                what = "does not answer: start the cluster, or correct --address (http://head:8265)"
            else:
                what = _OTHER_SERVER
            raise HeadLost(f"{self.address} {what}") from error
        except (RuntimeError, ValueError, KeyError) as error:
            if "Version check returned 404" in str(error):
                raise HeadLost(f"{self.address} {_OTHER_SERVER}") from error
            raise HeadLost(f"{self.address}: {_reason(error)}") from error


class _Client(JobSubmissionClient):  # type: ignore[misc]  # ray has no annotations that mypy could follow
    """Ray's client, which by itself would wait for ever for a head that has lost its power."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_TIMEOUTS_S, **options)


def _joined(job: Job, spec: JobSpec) -> Job:
    # with --fresh or without, it is the run that the job is at
    if words_again(shlex.split(job.words)) != words_again(spec.words):
        stop = shlex.join(["python", "-m", "jobs", "stop", job.run, "--address", spec.address])
        raise UsageError(
            f"run {job.run!r} is being worked on by job {job.id} with other words ({job.words}): stop it first "
            f"({stop}), or choose another --run name"
        )
    return job


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id,
        run=metadata.get(Tag.RUN, ""),
        status=str(details.status),
        words=details.entrypoint.removeprefix(_ENTRYPOINT),
        commit=metadata.get(Tag.COMMIT, ""),
        message=details.message or "",
        exit_status=details.driver_exit_code,
        started=(details.start_time or 0) / 1000,
    )


def _refused(address: str, reason: str) -> HemocoError:
    if "Authentication required" in reason:
        return HemocoError(
            f"{address} wants a token (401) and none was sent: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a "
            "file with the token of this cluster"
        )
    if "Authentication failed" in reason:
        return HemocoError(
            f"{address} does not take this token (403): it is that of another cluster; correct the file that "
            "RAY_AUTH_TOKEN_PATH names, or RAY_AUTH_TOKEN"
        )
    return HemocoError(
        f"{address}: {reason.strip().splitlines()[0]}; check RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH"
    )


def _reason(error: Exception) -> str:
    """What the head said, without its traceback."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
