"""What a sweep came to, read from MLflow and nowhere else."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from hemoco.errors import UsageError
from hemoco.tracking.client import connect
from hemoco.tracking.runs import RunFacts, find_run, search
from hemoco.tracking.tags import Tag

OBJECTIVE = "objective"
"""The metric of a trial's run in MLflow."""
Outcome = Literal["finished", "stopped", "failed", "unfinished"]
_FREE = ("sweep.trials", "sweep.max_concurrent")
"""A sweep goes on with others."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of Ray's messages
_ORDER: tuple[Outcome, ...] = ("finished", "stopped", "unfinished", "failed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial."""

    trial: int
    run: str
    """Name of its run: `python -m jobs status RUN` shows it whole."""
    settings: dict[str, str]
    """What it has of the space, by dotted names."""
    outcome: Outcome
    objective: float
    """nan where it was not measured."""
    epochs: int
    """Done by its pretraining."""
    reason: str
    """Why it stopped or failed."""
    run_id: str
    """Of the trial in MLflow."""
    backbone_url: str
    """Empty where there is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A sweep and its trials, the best first."""

    sweep: str
    run_id: str
    """In MLflow."""
    status: str
    """Of its run in MLflow."""
    recipe: str
    recipe_file: str
    """Where the recipe was, on the machine that began the sweep; empty for those that come with hemoco."""
    storage: str
    """URL of its folder; empty where an older version did not record it."""
    objective: str
    """Transfer and metric."""
    watch: str
    """What decided about early stops; empty where nothing did."""
    data_digest: str
    params: dict[str, str]
    """Every setting of the recipe by its dotted name."""
    tags: dict[str, str]
    """Of its run in MLflow."""
    trials: tuple[TrialResult, ...]

    @property
    def best(self) -> TrialResult | None:
        """The one with the highest objective."""
        return self.trials[0] if self.trials and self.trials[0].outcome == "finished" else None


def search_settings(params: Mapping[str, str]) -> dict[str, str]:
    """What of a recipe's flat settings makes a search what it is, by names that a run does not ignore."""
    searched = {
        name: value
        for name, value in params.items()
        if name.startswith("sweep.") and name not in _FREE
    }
    return {f"its {name}": value for name, value in searched.items()}


def is_over(trial: RunFacts) -> bool:
    """Whether a trial has come to its end or was stopped for good; the others are begun again by the same words."""
    return trial.status == "FINISHED" or Tag.STOPPED in trial.tags


def sweep_result(uri: str, sweep: str) -> SweepResult:
    """What MLflow has recorded of a sweep so far.

    Raises:
        UsageError: MLflow knows no sweep of this name.
        TrackingError: MLflow cannot be used.
    """
    found = find_sweep(uri, sweep)
    if found is None:
        known = {facts.tags[Tag.SWEEP] for facts in search(uri, connect(uri), {Tag.PHASE: "sweep"})}
        raise UsageError(
            f"sweep {sweep!r} is not in MLflow; it has {', '.join(sorted(known)) or 'none'}"
        )
    return found


def find_sweep(uri: str, sweep: str) -> SweepResult | None:
    """As `sweep_result`; None where MLflow knows no sweep of this name.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    experiment_id = connect(uri)
    parent = find_run(uri, experiment_id, {Tag.SWEEP: sweep, Tag.PHASE: "sweep"})
    if parent is None:
        return None
    trials = search(uri, experiment_id, {Tag.SWEEP: sweep, Tag.PHASE: "trial"})
    newest_first = search(
        uri, experiment_id, {Tag.PHASE: "pretrain"}, prefix={Tag.RUN: f"{sweep}/"}
    )
    pretrainings = {facts.tags[Tag.RUN]: facts for facts in reversed(newest_first)}
    return SweepResult(
        sweep=sweep,
        run_id=parent.run_id,
        status=parent.status,
        recipe=parent.tags[Tag.RECIPE],
        recipe_file=parent.tags.get(Tag.RECIPE_FILE, ""),
        storage=parent.tags.get(Tag.STORAGE, ""),
        objective=f"{parent.params['sweep.objective']}/{parent.tags[Tag.METRIC]}",
        watch=parent.params["sweep.watch"],
        data_digest=parent.tags[Tag.DATA_DIGEST],
        params=parent.params,
        tags=parent.tags,
        trials=tuple(sorted((_trial(facts, pretrainings) for facts in trials), key=_rank)),
    )


def sweep_json(result: SweepResult) -> str:
    """The fields of `SweepResult` but `params` and `tags`, and `best`: a trial's number, null if none has finished."""
    facts: dict[str, Any] = dataclasses.asdict(result)
    del facts["params"], facts["tags"]
    for trial in facts["trials"]:
        trial["objective"] = None if math.isnan(trial["objective"]) else trial["objective"]
    trials = facts.pop("trials")
    best = result.best.trial if result.best else None
    return json.dumps(facts | {"best": best, "trials": trials}, indent=2) + "\n"


def _trial(facts: RunFacts, pretrainings: Mapping[str, RunFacts]) -> TrialResult:
    run = f"{facts.tags[Tag.SWEEP]}/{facts.tags['mlflow.runName']}"
    pretraining = pretrainings.get(run)
    became = outcome(facts)
    return TrialResult(
        trial=int(facts.tags[Tag.TRIAL]),
        run=run,
        settings=facts.params,
        outcome=became,
        objective=facts.metrics.get(OBJECTIVE, math.nan) if became == "finished" else math.nan,
        epochs=_epochs(facts, pretraining),
        reason=_reason(facts, became),
        run_id=facts.run_id,
        backbone_url=pretraining.tags.get(Tag.BACKBONE_URL, "") if pretraining else "",
    )


def outcome(facts: RunFacts) -> Outcome:
    """What became of a trial, by its run."""
    if is_over(facts):
        return "finished" if facts.status == "FINISHED" else "stopped"
    return "failed" if facts.status == "FAILED" else "unfinished"


def _reason(facts: RunFacts, became: Outcome) -> str:
    error = _COLOUR.sub("", facts.tags.get(Tag.ERROR, ""))
    return facts.tags.get(Tag.VERDICT, error) if became == "stopped" else error


def _epochs(trial: RunFacts, pretraining: RunFacts | None) -> int:
    if pretraining is None:
        return 0
    return pretraining.steps.get("loss", 0) // int(trial.tags[Tag.STEPS_PER_EPOCH])


def _rank(trial: TrialResult) -> tuple[int, float, int, int]:
    value = -math.inf if math.isnan(trial.objective) else trial.objective
    return _ORDER.index(trial.outcome), -value, -trial.epochs, trial.trial
