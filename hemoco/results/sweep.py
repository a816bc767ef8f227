"""The results of a sweep, read from MLflow alone."""

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
"""Name of the metric of a trial's MLflow run that has its result."""
Outcome = Literal["finished", "stopped", "failed", "unfinished"]
_FREE = ("sweep.trials", "sweep.max_concurrent")
"""Settings that may change when a sweep is resumed."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""Terminal colours, which Ray puts into the messages of its errors."""
_ORDER: tuple[Outcome, ...] = ("finished", "stopped", "unfinished", "failed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial."""

    trial: int
    run: str
    """Name of the trial's run; `python -m jobs status RUN` shows its details."""
    settings: dict[str, str]
    """The settings drawn for it, by dotted names."""
    outcome: Outcome
    objective: float
    """nan if it was not measured."""
    epochs: int
    """Epochs that the pretraining has done."""
    reason: str
    """Reason for which it was stopped or failed; empty otherwise."""
    run_id: str
    """MLflow's id of the trial."""
    backbone_url: str
    """Empty if there is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A sweep and its trials, best first."""

    sweep: str
    run_id: str
    """MLflow's id of the sweep's run."""
    status: str
    """Status of that run."""
    recipe: str
    recipe_file: str
    """Path of the recipe on the machine that began the sweep; empty for a shipped recipe."""
    storage: str
    """URL of the sweep's folder; empty if an older version did not record it."""
    objective: str
    """Transfer and metric, as TRANSFER/METRIC."""
    watch: str
    """The metric that decides about early stops; empty if there are none."""
    data_digest: str
    params: dict[str, str]
    """Every setting of the recipe by its dotted name."""
    tags: dict[str, str]
    """Tags of the sweep's run in MLflow."""
    trials: tuple[TrialResult, ...]

    @property
    def best(self) -> TrialResult | None:
        """The finished trial with the highest objective; None if none has finished."""
        if self.trials and self.trials[0].outcome == "finished":
            return self.trials[0]
        return None


def search_settings(params: Mapping[str, str]) -> dict[str, str]:
    """Returns the settings by which a sweep is the same search, from a recipe's flat settings.

    Their names get the prefix "its ", since `config_difference` ignores everything below `sweep.`.
    """
    return {
        f"its {name}": value
        for name, value in params.items()
        if name.startswith("sweep.") and name not in _FREE
    }


def is_over(trial: RunFacts) -> bool:
    """Returns whether a trial is finished or stopped for good; the others can be resumed."""
    return trial.status == "FINISHED" or Tag.STOPPED in trial.tags


def sweep_result(uri: str, sweep: str) -> SweepResult:
    """Returns what MLflow has recorded of a sweep so far.

    Raises:
        UsageError: MLflow has no sweep of this name.
        TrackingError: MLflow cannot be used.
    """
    result = find_sweep(uri, sweep)
    if result is None:
        known = {facts.tags[Tag.SWEEP] for facts in search(uri, connect(uri), {Tag.PHASE: "sweep"})}
        raise UsageError(
            f"sweep {sweep!r} is not in MLflow; it has {', '.join(sorted(known)) or 'none'}"
        )
    return result


def find_sweep(uri: str, sweep: str) -> SweepResult | None:
    """Returns what MLflow has recorded of a sweep so far; None if it has no sweep of this name.

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
    results = [_trial(facts, pretrainings) for facts in trials]
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
        trials=tuple(sorted(results, key=_rank)),
    )


def sweep_json(result: SweepResult) -> str:
    """Returns a sweep as JSON: the fields of `SweepResult` without `params` and `tags`, and `best`.

    `best` is the number of the best trial, null if none has finished.
    """
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
    trial_outcome = outcome(facts)
    objective = math.nan
    if trial_outcome == "finished":
        objective = facts.metrics.get(OBJECTIVE, math.nan)
    return TrialResult(
        trial=int(facts.tags[Tag.TRIAL]),
        run=run,
        settings=facts.params,
        outcome=trial_outcome,
        objective=objective,
        epochs=_epochs(facts, pretraining),
        reason=_reason(facts, trial_outcome),
        run_id=facts.run_id,
        backbone_url=pretraining.tags.get(Tag.BACKBONE_URL, "") if pretraining else "",
    )


def outcome(facts: RunFacts) -> Outcome:
    """Returns the outcome of a trial, given its MLflow run."""
    if is_over(facts):
        return "finished" if facts.status == "FINISHED" else "stopped"
    return "failed" if facts.status == "FAILED" else "unfinished"


def _reason(facts: RunFacts, trial_outcome: Outcome) -> str:
    error = _COLOUR.sub("", facts.tags.get(Tag.ERROR, ""))
    return facts.tags.get(Tag.VERDICT, error) if trial_outcome == "stopped" else error


def _epochs(trial: RunFacts, pretraining: RunFacts | None) -> int:
    if pretraining is None:
        return 0
    return pretraining.steps.get("loss", 0) // int(trial.tags[Tag.STEPS_PER_EPOCH])


def _rank(trial: TrialResult) -> tuple[int, float, int, int]:
    """Key that sorts the best trial first."""
    value = -math.inf if math.isnan(trial.objective) else trial.objective
    return _ORDER.index(trial.outcome), -value, -trial.epochs, trial.trial
