"""What many tasks found, counted by reason, each with its first example."""

from collections.abc import Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """What was met once or more."""

    reason: str
    times: int
    first: str
    """The first it was met at."""


def count_reasons(cases: Iterable[tuple[str, str]]) -> list[Finding]:
    """The findings of (name, reason) pairs, one for each reason, in alphabetical order."""
    return unite_findings(Finding(reason, 1, name) for name, reason in cases)


def unite_findings(findings: Iterable[Finding]) -> list[Finding]:
    """The findings of several tasks, one for each reason, in alphabetical order; the first one's example stays."""
    united: dict[str, Finding] = {}
    for finding in findings:
        known = united.get(finding.reason)
        united[finding.reason] = finding if known is None else known._replace(times=known.times + finding.times)
    return [united[reason] for reason in sorted(united)]
