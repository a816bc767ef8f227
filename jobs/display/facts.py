"""The records of a run or a sweep that the live display shows: the only module of the display that asks MLflow."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hemoco.tracking.runs import RunFacts, search
from hemoco.tracking.tags import Tag

MOST_RUNS = 500
"""Runs that one look at MLflow reads: one page, since the next look comes soon."""


class Facts(NamedTuple):
    """The pretraining and the transfers of a run that MLflow has."""

    pretraining: RunFacts | None = None
    transfers: Mapping[str, RunFacts] = {}
    """By name; only those that were begun."""


class SweepFacts(NamedTuple):
    """The trials of a sweep that MLflow has."""

    trials: Mapping[int, RunFacts] = {}
    """By number; only those that were opened."""
    pretrainings: Mapping[int, RunFacts] = {}
    """The newest pretraining of each trial that has begun, by the trial's number."""


def read_facts(uri: str, experiment_id: str, run: str) -> Facts:
    """Reads a run once, without retries; of repeated phases the newest counts, as in a comparison.

    Raises:
        TrackingError: MLflow does not answer.
    """
    pretraining, transfers = None, {}
    for phase in _phases(
        uri, experiment_id, {Tag.RUN: run}, exclude={Tag.PHASE: ("curve", "parent")}
    ):
        if phase.tags[Tag.PHASE] == "pretrain":
            pretraining = phase
        elif phase.tags[Tag.PHASE] == "transfer":
            transfers[phase.tags[Tag.TRANSFER]] = phase
    return Facts(pretraining, transfers)


def read_sweep(uri: str, experiment_id: str, sweep: str) -> SweepFacts:
    """Reads a sweep once, without retries.

    Raises:
        TrackingError: MLflow does not answer.
    """
    pretrainings = {}
    prefix = f"{sweep}/trial_"
    for phase in _phases(uri, experiment_id, {Tag.PHASE: "pretrain"}, prefix={Tag.RUN: prefix}):
        number = phase.tags[Tag.RUN].removeprefix(prefix)
        if number.isdigit():
            pretrainings[int(number)] = phase
    opened = _phases(uri, experiment_id, {Tag.PHASE: "trial", Tag.SWEEP: sweep})
    trials = {int(phase.tags[Tag.TRIAL]): phase for phase in opened}
    return SweepFacts(dict(sorted(trials.items())), pretrainings)


def _phases(
    uri: str,
    experiment_id: str,
    tags: Mapping[str, str],
    *,
    exclude: Mapping[str, Sequence[str]] | None = None,
    prefix: Mapping[str, str] | None = None,
) -> list[RunFacts]:
    """The newest runs that match, the oldest of them first; the display looks again soon, so nothing is retried."""
    found = search(
        uri, experiment_id, tags, exclude=exclude, prefix=prefix, limit=MOST_RUNS, patience_s=0.0
    )
    return found[::-1]
