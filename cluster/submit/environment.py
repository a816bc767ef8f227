"""What a submitted job gets from the environment it was submitted in: where things are, and never a secret.

Ray shows a job's words and variables to everybody who may see its dashboard, and keeps them. Credentials stand in the
environment of the nodes.
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

_STOP_S = 60  # after SIGTERM, Ray itself gives 3: too few to tell MLflow
_FORWARDED = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "MLFLOW_TRACKING_URI",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)
_PLACES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI")
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
_SHORTEST_SECRET = 8  # a shorter value would be found in many an innocent word
_SECRET_LOOKS = {
    "a name, password or token in a URL": re.compile(
        r"://[^/?#\s]+@"
    ),  # some servers take a token as the user's name
    "an AWS access key": re.compile(r"(?<![A-Z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    "a signed URL": re.compile(
        r"[?&](X-Amz-Signature|X-Amz-Credential|AWSAccessKeyId|Signature|sig|token)=", re.I
    ),
}


class JobSpec(NamedTuple):
    """A job as a cluster gets it, checked for secrets."""

    address: str
    """Of the cluster."""
    run: str
    """The run it works on."""
    words: tuple[str, ...]
    """What follows `python -m jobs`."""
    checkout: Path
    """Folder that is uploaded."""
    variables: dict[str, str]
    """Of the environment of its driver and its workers."""

    @property
    def commit(self) -> str:
        """Of the checkout, short, with `-dirty` where that has changes or may have some; empty if unknown."""
        dirty = "" if self.variables.get("HEMOCO_GIT_DIRTY") == "false" else "-dirty"
        return (
            f"{self.variables['HEMOCO_GIT_COMMIT'][:12]}{dirty}"
            if "HEMOCO_GIT_COMMIT" in self.variables
            else ""
        )


def job_spec(address: str, run: str, words: Sequence[str], checkout: Path) -> JobSpec:
    """Puts a job together, with the variables that travel with it.

    Args:
        address: of the cluster; one on this machine may use what only this machine reaches.
        run: its identity.
        words: what follows `python -m jobs`.
        checkout: folder that is uploaded, and whose commit is told.

    Raises:
        UsageError: a word or a variable holds a secret, which the message does not repeat; or a variable means
            nothing on another machine.
    """
    for position, word in enumerate(words, 1):
        if secret := secret_in(word):
            raise UsageError(
                f"word {position} after `submit` holds {secret}, and the words of a job can be read in Ray's dashboard "
                "and log: give a plain s3:// URL, and put the credentials into the nodes' environment"
            )
    given = {name: os.environ[name] for name in _FORWARDED if os.environ.get(name)}
    for name, value in given.items():
        _check_variable(name, value, address)
    always = {name: os.environ.get(name) or value for name, value in _ALWAYS.items()}
    return JobSpec(address, run, tuple(words), checkout, always | given | _git_variables(checkout))


def words_again(words: Sequence[str]) -> list[str]:
    """The words that go on with what these began: without `--fresh`, which would delete its checkpoints."""
    return [word for word in words if word != "--fresh"]


def secret_in(text: str) -> str:
    """What of a text looks like a secret, in words; empty if nothing does."""
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST_SECRET and value in text:
            return f"the value of {name}"
    return next((what for what, look in _SECRET_LOOKS.items() if look.search(text)), "")


def _check_variable(name: str, value: str, address: str) -> None:
    if secret := secret_in(value):
        raise UsageError(
            f"{name} holds {secret}, and the variables of a job can be read in Ray's dashboard: take it out of {name} "
            f"here, and put {_instead(name)} into the nodes' environment"
        )
    if name in _PLACES and _only_here(value) and not _only_here(address):
        raise UsageError(
            f"{name} is {value}, which the nodes of {address} cannot reach: name one that they can, or unset it and "
            "have it in the nodes' environment"
        )


def _instead(name: str) -> str:
    if name == "MLFLOW_TRACKING_URI":
        return "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return "the AWS_* credentials"


def _only_here(url: str) -> bool:
    """Whether the URL means this machine only: a file, SQLite, or loopback."""
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
