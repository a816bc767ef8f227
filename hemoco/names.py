"""The rule for names of runs, sweeps, recipes and transfers.

Names become folders, so no name may contain a slash or be `.` or `..`.
"""

import re

from hemoco.errors import UsageError

_NAME = re.compile(r"(?!\.+\Z)[A-Za-z0-9._-]+")
NAME_RULE = (
    "letters (A-Z, a-z), digits, '.', '_' and '-', and not dots alone; for example moco-v2.seed_1"
)
"""The rule in words, for error messages."""


def is_name(text: str) -> bool:
    """Returns True if the text follows the rule for names."""
    return _NAME.fullmatch(text) is not None


def check_new_name(what: str, name: str) -> None:
    """Refuses an invalid name for a new run or sweep.

    Args:
        what: the flag or argument the name came from, for the message.
        name: the name as given.

    Raises:
        UsageError: it does not follow the rule.
    """
    if not is_name(name):
        raise UsageError(f"{what} is {name!r}: allowed are {NAME_RULE}")


def check_run_name(what: str, name: str) -> None:
    """Refuses a name that is neither a run's nor, as SWEEP/TRIAL, that of a trial in a sweep.

    Args:
        what: the flag or argument the name came from, for the message.
        name: the name as given.

    Raises:
        UsageError: it is neither of the two.
    """
    parts = name.split("/")
    if len(parts) > 2 or not all(map(is_name, parts)):
        raise UsageError(
            f"{what} is {name!r}: allowed are {NAME_RULE}; or SWEEP/TRIAL, "
            "for example lr-search/trial_0003"
        )
