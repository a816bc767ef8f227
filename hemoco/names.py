"""One rule for the names of runs, sweeps, recipes and transfers: they become folders, so none may lead out of one."""

import re

from hemoco.errors import UsageError

_NAME = re.compile(r"(?!\.+\Z)[A-Za-z0-9._-]+")
NAME_RULE = (
    "letters (A-Z, a-z), digits, '.', '_' and '-', and not dots alone; for example moco-v2.seed_1"
)
"""What a name consists of, for error messages."""


def is_name(text: str) -> bool:
    """Whether a text follows the rule for names."""
    return _NAME.fullmatch(text) is not None


def check_new_name(what: str, name: str) -> None:
    """Refuses a name that a run or sweep may not be given.

    Args:
        what: the flag or argument that gave it, for the message.
        name: what was given.

    Raises:
        UsageError: it does not follow the rule.
    """
    if not is_name(name):
        raise UsageError(f"{what} is {name!r}: allowed are {NAME_RULE}")


def check_run_name(what: str, name: str) -> None:
    """Refuses what can be neither the name of a run nor SWEEP/TRIAL, the name of a sweep's trial.

    Args:
        what: the flag or argument that gave it, for the message.
        name: what was given.

    Raises:
        UsageError: it is neither.
    """
    parts = name.split("/")
    if len(parts) > 2 or not all(map(is_name, parts)):
        raise UsageError(
            f"{what} is {name!r}: allowed are {NAME_RULE}; or SWEEP/TRIAL, for example lr-search/trial_0003"
        )
