"""The command and environment variables that are sent with a job: locations, never secrets.

Ray keeps the command and the variables of a job and shows them to everybody who may see its
dashboard. Credentials are set in the environment of the nodes.
"""

import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from cluster.local.ray import RAY_DEFAULTS
from cluster.submit.checkout import git_facts
from hemoco.errors import UsageError
from hemoco.tracking.tags import Tag

_STOP_S = 60  # until SIGKILL; Ray's default of 3 is too short to close the run in MLflow
_FORWARDED = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "MLFLOW_TRACKING_URI",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)
_LOCATIONS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI")
_ALWAYS = {
    **RAY_DEFAULTS,
    "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
_SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
)
_SHORTEST_SECRET = 8  # a shorter value would be found in many harmless texts
_SECRET_PATTERNS = {
    # some servers take a token as the user's name
    "a name, password or token in a URL": re.compile(r"://[^/?#\s]+@"),
    "an AWS access key": re.compile(r"(?<![A-Z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    "a signed URL": re.compile(
        r"[?&](X-Amz-Signature|X-Amz-Credential|AWSAccessKeyId|Signature|sig|token)=", re.I
    ),
}


class JobSpec(NamedTuple):
    """A job as a cluster gets it, checked for secrets."""

    address: str
    """Address of the cluster."""
    run: str
    """Name of the run that it works on."""
    argv: tuple[str, ...]
    """The command line after `python -m jobs`."""
    checkout: Path
    """Folder that is uploaded."""
    variables: dict[str, str]
    """Environment variables of its driver and its workers."""

    @property
    def commit(self) -> str:
        """Short commit of the checkout, with `-dirty` unless it is known to have no changes.

        Empty if the commit is not known.
        """
        commit = self.variables.get("HEMOCO_GIT_COMMIT", "")[:12]
        is_clean = self.variables.get("HEMOCO_GIT_DIRTY") == "false"
        return commit if is_clean or not commit else f"{commit}-dirty"


def job_spec(address: str, run: str, argv: Sequence[str], checkout: Path) -> JobSpec:
    """Builds a job, with the environment variables that are sent with it.

    Args:
        address: address of the cluster; one on this machine may use what only this machine reaches.
        run: name of the run.
        argv: the command line after `python -m jobs`.
        checkout: folder that is uploaded.

    Raises:
        UsageError: an argument or a variable holds a secret, which the message does not repeat; or
            a variable names a location that the cluster cannot reach.
    """
    for position, argument in enumerate(argv, 1):
        secret = secret_in(argument)
        if secret:
            raise UsageError(
                f"argument {position} after `submit` holds {secret}, and the command of a job can "
                "be read in Ray's dashboard and log: give a plain s3:// URL, and put the "
                "credentials into the nodes' environment"
            )
    given = {name: os.environ[name] for name in _FORWARDED if os.environ.get(name)}
    for name, value in given.items():
        _check_variable(name, value, address)
    always = {name: os.environ.get(name) or value for name, value in _ALWAYS.items()}
    variables = always | given | _git_variables(checkout)
    return JobSpec(address, run, tuple(argv), checkout, variables)


def resuming_argv(argv: Sequence[str]) -> list[str]:
    """Returns the command line without `--fresh`, which would delete the run's checkpoints."""
    return [argument for argument in argv if argument != "--fresh"]


def secret_in(text: str) -> str:
    """Describes what in a text looks like a secret, without repeating it; empty if nothing does."""
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST_SECRET and value in text:
            return f"the value of {name}"
    for description, pattern in _SECRET_PATTERNS.items():
        if pattern.search(text):
            return description
    return ""


def _check_variable(name: str, value: str, address: str) -> None:
    secret = secret_in(value)
    if secret:
        instead = "the AWS_* credentials"
        if name == "MLFLOW_TRACKING_URI":
            instead = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise UsageError(
            f"{name} holds {secret}, and the variables of a job can be read in Ray's dashboard: "
            f"take it out of {name} here, and put {instead} into the nodes' environment"
        )
    if name in _LOCATIONS and _is_local(value) and not _is_local(address):
        raise UsageError(
            f"{name} is {value}, which the nodes of {address} cannot reach: name one that they "
            "can, or unset it and set it in the nodes' environment"
        )


def _is_local(url: str) -> bool:
    """Returns whether only this machine reaches the URL: a file, SQLite, or loopback."""
    parts = urlsplit(url)
    if parts.scheme in ("", "file") or parts.scheme.startswith("sqlite"):
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"


def _git_variables(checkout: Path) -> dict[str, str]:
    facts = git_facts(checkout)
    if not facts:
        return {}
    return {
        "HEMOCO_GIT_COMMIT": facts["mlflow.source.git.commit"],
        "HEMOCO_GIT_DIRTY": facts[Tag.GIT_DIRTY],
    }
