"""What MLflow knows of a run while somebody watches it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hemoco.tracking.client import ask
from hemoco.tracking.runs import RunFacts, facts_of
from hemoco.tracking.tags import Tag


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
    wanted = f'tags.`hemoco.run` = "{run}" and tags.`hemoco.phase` != "curve" and tags.`hemoco.phase` != "parent"'
    phases = _by_phase(search_once(uri, experiment_id, wanted))  # the newest counts, as in a comparison
    transfers = {phase.facts.tags[Tag.TRANSFER]: phase for phase in phases.get("transfer", [])}
    return Facts(next(reversed(phases.get("pretrain", [])), None), transfers)


def search_once(uri: str, experiment_id: str, wanted: str) -> list[Any]:
    """The newest 500 runs that are as wanted, the oldest of them first; who looks again soon need not wait long.

    Raises:
        TrackingError: MLflow does not answer.
    """
    options: dict[str, Any] = {"max_results": 500, "order_by": ["attributes.start_time DESC"]}
    found = ask(uri, lambda client: list(client.search_runs([experiment_id], wanted, **options)), patience_s=0.0)
    return found[::-1]


def last_steps(run: Any) -> dict[str, int]:
    """At which the metrics of one of MLflow's runs were last measured; its public dictionary has lost that."""
    return {point.key: int(point.step) for point in run.data._metric_objs}


def _by_phase(found: list[Any]) -> dict[str, list[Phase]]:
    phases: dict[str, list[Phase]] = {}
    for run in found:
        facts = facts_of(run)
        ended_s = run.info.end_time / 1000 if run.info.end_time else None
        phases.setdefault(facts.tags[Tag.PHASE], []).append(Phase(facts, last_steps(run), ended_s))
    return phases
