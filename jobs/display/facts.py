"""The records of a run or a sweep that the live display shows: the only module of the display that asks MLflow."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hemoco.tracking.client import ask
from hemoco.tracking.runs import RunFacts, facts_of, metric_steps
from hemoco.tracking.tags import Tag


class Phase(NamedTuple):
    """One MLflow run: a pretraining or a transfer."""

    facts: RunFacts
    steps: dict[str, int]
    """The newest step of each metric."""
    ended_s: float | None
    """When it last ended, in seconds since 1970."""


class Facts(NamedTuple):
    """The pretraining and the transfers of a run that MLflow has."""

    pretraining: Phase | None = None
    transfers: Mapping[str, Phase] = {}
    """By name; only those that were begun."""


class SweepFacts(NamedTuple):
    """The trials of a sweep that MLflow has."""

    trials: Mapping[int, RunFacts] = {}
    """By number; only those that were opened."""
    pretrainings: Mapping[int, Phase] = {}
    """The newest pretraining of each trial that has begun, by the trial's number."""


def read_facts(uri: str, experiment_id: str, run: str) -> Facts:
    """Reads a run once, without retries; of repeated phases the newest counts, as in a comparison.

    Raises:
        TrackingError: MLflow does not answer.
    """
    pretraining, transfers = None, {}
    for phase in _search(uri, experiment_id, f'tags.`{Tag.RUN}` = "{run}" and tags.`{Tag.PHASE}` != "curve"'):
        if phase.facts.tags[Tag.PHASE] == "pretrain":
            pretraining = phase
        elif phase.facts.tags[Tag.PHASE] == "transfer":
            transfers[phase.facts.tags[Tag.TRANSFER]] = phase
    return Facts(pretraining, transfers)


def read_sweep(uri: str, experiment_id: str, sweep: str) -> SweepFacts:
    """Reads a sweep once, without retries.

    Raises:
        TrackingError: MLflow does not answer.
    """
    pretrainings = {}
    wanted = f'tags.`{Tag.PHASE}` = "pretrain" and tags.`{Tag.RUN}` LIKE "{sweep}/trial_%"'
    for phase in _search(uri, experiment_id, wanted):
        folder, _, number = phase.facts.tags[Tag.RUN].rpartition("/trial_")
        if folder == sweep and number.isdigit():  # LIKE takes _ for any letter
            pretrainings[int(number)] = phase
    wanted = f'tags.`{Tag.PHASE}` = "trial" and tags.`{Tag.SWEEP}` = "{sweep}"'
    trials = {int(phase.facts.tags[Tag.TRIAL]): phase.facts for phase in _search(uri, experiment_id, wanted)}
    return SweepFacts(dict(sorted(trials.items())), pretrainings)


def _search(uri: str, experiment_id: str, wanted: str) -> list[Phase]:
    """The newest 500 runs that match, the oldest of them first; the display looks again soon, so nothing is retried."""
    options: dict[str, Any] = {"max_results": 500, "order_by": ["attributes.start_time DESC"]}
    runs = ask(uri, lambda client: list(client.search_runs([experiment_id], wanted, **options)), patience_s=0.0)
    return [
        Phase(facts_of(run), metric_steps(run), run.info.end_time / 1000 if run.info.end_time else None)
        for run in reversed(runs)
    ]
