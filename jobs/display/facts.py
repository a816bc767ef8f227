"""Records of a run or sweep for the live display; its only module that reads MLflow."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hemoco.tracking.runs import RunFacts, search
from hemoco.tracking.tags import Tag

MOST_RUNS = 500
"""Most runs that one read of MLflow returns: one page, since the next read comes soon."""


class Facts(NamedTuple):
    """Pretraining and transfers of a run, as far as MLflow has them."""

    pretraining: RunFacts | None = None
    transfers: Mapping[str, RunFacts] = {}
    """The transfers that have begun, by name."""


class SweepFacts(NamedTuple):
    """Trials of a sweep, as far as MLflow has them."""

    trials: Mapping[int, RunFacts] = {}
    """The trials that were opened, by number."""
    pretrainings: Mapping[int, RunFacts] = {}
    """The newest pretraining of each trial that has begun one, by the trial's number."""


def read_facts(uri: str, experiment_id: str, run: str) -> Facts:
    """Reads a run once, without retries; the newest of repeated phases counts, as in a comparison.

    Raises:
        TrackingError: MLflow does not answer.
    """
    pretraining, transfers = None, {}
    without = {Tag.PHASE: ("curve", "parent")}
    for phase in _phases(uri, experiment_id, {Tag.RUN: run}, exclude=without):
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
        # MLflow matches prefixes by LIKE, where `_` stands for any character
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
    """Searches the newest runs that match; returns them with the oldest first."""
    newest_first = search(
        uri, experiment_id, tags, exclude=exclude, prefix=prefix, limit=MOST_RUNS, patience_s=0.0
    )
    return newest_first[::-1]
