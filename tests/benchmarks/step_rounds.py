"""Rounds in which ways of doing the same take turns, the ratios of each round, and goals.

A busy machine slows all ways of a round; so figures are medians over the rounds of ratios within a
round.
"""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from machine import table
from peers import Peer

HERE = Path(__file__).parent


class UnavailableError(Exception):
    """Something to compare is unavailable here; the message gives the reason."""


class Found(NamedTuple):
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    def spread(self) -> str:
        """The range, to print."""
        digits = 0 if self.high >= 100 else 2
        return f"{self.low:,.{digits}f} to {self.high:,.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure and what it should be."""

    what: str
    found: Found
    goal: float
    at_least: bool = True

    def row(self) -> tuple[str, str, str, str, str]:
        """For `print_goals`."""
        met = self.found.median >= self.goal if self.at_least else self.found.median <= self.goal
        sign, verdict = ">=" if self.at_least else "<=", "met" if met else "NOT MET"
        return (
            self.what,
            f"{self.found.median:.3g}",
            self.found.spread(),
            f"{sign} {self.goal:g}",
            verdict,
        )


class Worker:
    """A process that holds one library's steps and times them when asked.

    Raises:
        UnavailableError: the process ended.
    """

    def __init__(self, command: list[str]) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=HERE.parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.about = json.loads(self._answer())

    def seconds(self, variant: str, calls: int) -> float:
        """Per call."""
        assert self._process.stdin is not None
        print(calls, variant, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise UnavailableError(" / ".join(self._errors.read().strip().splitlines()[-2:])[-400:])
        return line


def peer_command(peer: Peer, checkout: Path | None) -> list[str]:
    """The Python that has a library.

    Raises:
        UnavailableError: there is none.
    """
    option, _, file = peer.checkout.partition(" ")
    if file and checkout is None:
        raise UnavailableError(f"not measured without {option} DIR, where DIR/{file} is")
    if checkout is not None and not (checkout / file).exists():
        raise UnavailableError(f"{checkout / file} is missing")
    script = str(HERE / "step_worker.py")
    if all(importlib.util.find_spec(_module(package)) for package in peer.packages):
        return [sys.executable, script]
    if shutil.which("uv") is None:
        raise UnavailableError(
            f"{', '.join(peer.packages)}: neither importable nor is there uv to bring them"
        )
    return [
        "uv",
        "run",
        "--frozen",
        "--no-sync",
        *(f"--with={package}" for package in peer.packages),
        "python",
        script,
    ]


def take_turns(
    ways: Sequence[str], rounds: int, measure: Callable[[str], float]
) -> list[dict[str, float]]:
    """Measures each way once a round.

    Each round begins elsewhere, so that no way is always beside the same neighbour.
    """
    found = []
    for turn in range(rounds):
        start = turn * 5 % len(ways)
        found.append({way: measure(way) for way in (*ways[start:], *ways[:start])})
    return found


def over_rounds(
    rounds: Sequence[Mapping[str, float]], figure: Callable[[Mapping[str, float]], float]
) -> Found:
    """Median and range over the rounds of a figure of one round."""
    values = [figure(each) for each in rounds]
    return (
        Found(statistics.median(values), min(values), max(values))
        if values
        else Found(*[math.nan] * 3)
    )


def print_goals(title: str, goals: Sequence[Goal]) -> None:
    """A line per goal, met or not."""
    if goals:
        names = ("goal", "found", "range", "wanted", "")
        print(table(title, names, [goal.row() for goal in goals]), flush=True)


def print_gaps(gaps: Mapping[str, str]) -> None:
    """Prints each thing that was not measured, with the reason."""
    for name, reason in gaps.items():
        print(f"gap: {name}: {reason}", flush=True)


def _module(package: str) -> str:
    return package.partition("<")[0]
