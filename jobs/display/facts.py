"""What MLflow knows of a run while somebody watches it."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hemoco.tracking.runs import RunFacts, search
from hemoco.tracking.tags import Tag

MOST_RUNS = 500
"""Runs that one look at MLflow reads: one page, since the next look comes soon."""


class Phase(NamedTuple):
    """One MLflow run: a pretraining or a transfer."""

    facts: RunFacts
    steps: dict[str, int]
    """At which its metrics were last measured."""
    ended_s: float | None
    """When it last ended, in seconds since 1970."""


class Facts(NamedTuple):
    """What MLflow knows of a run."""

    pretraining: Phase | None = None
    transfers: Mapping[str, Phase] = {}
    """By name; only those that were begun."""


def read_facts(uri: str, experiment_id: str, run: str) -> Facts:
    """What MLflow knows of a run now, by one question that is asked once.

    Raises:
        TrackingError: MLflow does not answer.
    """
    found = search(
        uri,
        experiment_id,
        {Tag.RUN: run},
        exclude={Tag.PHASE: ("curve", "parent")},
        limit=MOST_RUNS,
        patience_s=0.0,
    )
    phases = _by_phase(reversed(found))  # the newest counts, as in a comparison
    transfers = {phase.facts.tags[Tag.TRANSFER]: phase for phase in phases.get("transfer", [])}
    return Facts(next(reversed(phases.get("pretrain", [])), None), transfers)


def _by_phase(found: Iterable[RunFacts]) -> dict[str, list[Phase]]:
    phases: dict[str, list[Phase]] = {}
    for facts in found:
        phases.setdefault(facts.tags[Tag.PHASE], []).append(Phase(facts, facts.steps, facts.ended_s))
    return phases
