"""A sweep: pretrainings that differ in some settings, each with the transfer that is the objective.

A trial is a run like any other, found by its name and resumed by the same command. Each has a
thread of this driver, and a bad one is stopped by a request (`pipeline.workers.stop_request`).

Ray Tune draws the settings, and its ASHA decides which trials stop, but its Tuner does not run the
trials. The Tuner would run each in an actor, a second driver with its own copies of torch and
MLflow, and stop it by killing the actor, which could not record in MLflow why it ended. It would
keep its state in files beside MLflow, and could not tell ASHA of trials that finished earlier.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import NamedTuple

import numpy as np
from ray import tune

from hemoco.config import Choice, Recipe, SweepConfig, Uniform, config_difference, flat_params
from hemoco.config.sweep import KNN, Range, with_settings
from hemoco.data.shards.index import ShardIndex, ShardIndexes
from hemoco.data.stream.batches import pretraining_plan, steps_per_epoch
from hemoco.errors import TrackingError, TrainingError, UsageError, first_line
from hemoco.names import check_new_name
from hemoco.results.records import PRETRAINED, run_results
from hemoco.results.status import close_running
from hemoco.results.sweep import OBJECTIVE, is_over, search_settings
from hemoco.storage.objects import join_url, list_names
from hemoco.tracking import client, metric_queue
from hemoco.tracking import runs as tracking
from hemoco.tracking.tags import Tag
from hemoco.tracking.unsent import MetricPoint
from pipeline.checks import check_urls
from pipeline.open_run import closing_run, same_folder
from pipeline.run import pretrain_then_transfer
from pipeline.run_folder import check_run_folder
from pipeline.sweep.early_stop import EarlyStop, Halving, Watched
from pipeline.transfer.fan_out import in_threads
from pipeline.transfer.units import headline_metric
from pipeline.workers.run_lock import only_driver
from pipeline.workers.stop_request import StoppedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """An opened sweep."""

    recipe: Recipe
    config: SweepConfig
    run: str
    uri: str
    experiment_id: str
    run_id: str
    """MLflow's id of the sweep's run, the parent of its trials."""
    storage: str
    indexes: ShardIndexes
    data: ShardIndex
    fresh: bool
    tags: dict[str, str]
    """Tags of the trials' runs."""
    stopping: threading.Event = dataclasses.field(default_factory=threading.Event)


class Trial(NamedTuple):
    """One point of the space."""

    number: int
    settings: dict[str, object]
    run: str
    """Name of its run."""
    run_id: str
    """MLflow's id of the trial, the parent of its run there."""
    over: bool
    """True if it is finished or was stopped for good."""


def run_sweep(
    recipe: Recipe,
    *,
    indexes: ShardIndexes,
    run: str,
    storage: str,
    fresh: bool,
    tags: dict[str, str],
) -> None:
    """Runs all trials that are not over.

    The result is in MLflow, where `hemoco.results.sweep` reads it.

    Args:
        recipe: a recipe with a `sweep`, and absolute URLs.
        indexes: shard indexes that this command has read.
        run: name of the sweep; its trials are the runs `RUN/trial_0000`, ...
        storage: URL of the folder that receives checkpoints and backbones.
        fresh: start anew; MLflow runs of this name are renamed and the trials' folders removed.
        tags: further tags of the sweep's run and its trials' in MLflow, for example the commit of
            the code.

    Raises:
        UsageError: the name belongs to another sweep or to a run, or another process works on it.
        TrainingError: all trials failed.
    """
    with only_driver(run):
        sweep = _open_sweep(
            recipe, indexes=indexes, run=run, storage=storage, fresh=fresh, tags=tags
        )
        trials = [
            _open_trial(sweep, number, settings)
            for number, settings in enumerate(drawn_settings(sweep.config))
        ]
        try:
            with closing_run(sweep.uri, sweep.run_id, sweep.stopping):
                _close_interrupted(sweep, trials)  # those that a killed driver left open
                _run_trials(sweep, trials)
        finally:
            if sweep.stopping.is_set():
                # The trials' threads end with this process, before they close their MLflow runs.
                # An error of MLflow must not replace the interruption.
                with suppress(TrackingError):
                    _close_interrupted(sweep, trials)


def drawn_settings(config: SweepConfig) -> list[dict[str, object]]:
    """Draws the settings of each trial from the sweep's space.

    They depend on the space and the seed only: with more trials, the first ones stay the same. If
    the space has choices only, no point is drawn twice.
    """
    generator = np.random.default_rng(config.seed)
    countable = all(isinstance(values, Choice) for values in config.space.values())
    drawn: list[dict[str, object]] = []
    while len(drawn) < config.trials:
        point = {name: _drawn(values, generator) for name, values in config.space.items()}
        if not countable or point not in drawn:
            drawn.append(point)
    return drawn


def trial_recipe(recipe: Recipe, settings: dict[str, object]) -> Recipe:
    """Returns the recipe of a trial with these settings.

    Of the sweep's transfers it has the objective and the watched one, and these start from the
    pretrained backbone only.

    Raises:
        ConfigError: the settings do not fit together.
    """
    sweep = recipe.sweep
    assert sweep is not None, "checked by the caller"
    curve = tuple(name for name in recipe.curve if name == sweep.watch)
    transfers = {
        name: dataclasses.replace(recipe.transfers[name], inits=(PRETRAINED,))
        for name in (sweep.objective, *curve)
    }
    base = dataclasses.replace(recipe, sweep=None, transfers=transfers, curve=curve)
    return with_settings(base, settings)


def _drawn(values: Range, generator: np.random.Generator) -> object:
    if isinstance(values, Choice):
        return tune.choice(list(values.values)).sample(random_state=generator)
    distribution = tune.uniform if isinstance(values, Uniform) else tune.loguniform
    number = distribution(values.low, values.high).sample(random_state=generator)
    # four digits are readable in tables and commands; rounding may leave the range
    return min(max(float(f"{number:.4g}"), values.low), values.high)


def _open_sweep(
    recipe: Recipe,
    *,
    indexes: ShardIndexes,
    run: str,
    storage: str,
    fresh: bool,
    tags: dict[str, str],
) -> Sweep:
    config = recipe.sweep
    assert config is not None, "checked by the caller"
    check_new_name("run", run)
    check_urls(recipe)
    data = indexes.at(recipe.data.shards)
    params = flat_params(recipe)
    uri = client.tracking_uri()
    experiment_id = client.connect(uri)
    if tracking.find_run(uri, experiment_id, {Tag.RUN: run, Tag.PHASE: "parent"}) is not None:
        raise UsageError(
            f"{run!r} is the name of a run, whose folder would be the sweep's: "
            "choose another --run name"
        )
    key = {Tag.SWEEP: run, Tag.PHASE: "sweep"}
    url = join_url(storage, run)
    if fresh:
        _check_trial_folders(url, run, config.trials)
        for old in tracking.search(uri, experiment_id, {Tag.SWEEP: run}):
            tracking.set_tags(uri, old.run_id, {Tag.SWEEP: f"{run} (superseded)"})
    known = tracking.find_run(uri, experiment_id, key)
    if known is None:
        facts = {
            Tag.RECIPE: recipe.name,
            Tag.DATA_DIGEST: data.digest,
            Tag.METRIC: headline_metric(recipe.transfers[config.objective]),
        }
        run_id = tracking.open_run(
            uri, experiment_id, name=run, parent=None, tags=key | facts, params=params
        )
    else:
        run_id = known.run_id
        difference = config_difference(
            known.params | search_settings(known.params), params | search_settings(params)
        )
        if difference:
            raise UsageError(
                f"sweep {run!r} exists with other settings ({'; '.join(difference[:5])}): "
                "choose another --run name, or --fresh to start it anew"
            )
        url = same_folder(known, run, url)
        tracking.reopen_run(uri, run_id)
    # the command's tags are those of the last code that worked on the sweep; `status` prints the
    # command that resumes it in this folder
    tracking.set_tags(uri, run_id, tags | {Tag.STORAGE: url})
    return Sweep(
        recipe=recipe,
        config=config,
        run=run,
        uri=uri,
        experiment_id=experiment_id,
        run_id=run_id,
        storage=storage,
        indexes=indexes,
        data=data,
        fresh=fresh,
        tags=tags,
    )


def _check_trial_folders(url: str, run: str, trials: int) -> None:
    """Refuses to start anew where a trial's folder is something else's, before any removal."""
    existing = set(list_names(url))
    for name in map(_trial_name, range(trials)):
        if name in existing:
            check_run_folder(join_url(url, name), f"{run}/{name}")


def _trial_name(number: int) -> str:
    return f"trial_{number:04d}"


def _open_trial(sweep: Sweep, number: int, settings: dict[str, object]) -> Trial:
    name = _trial_name(number)
    key = {Tag.SWEEP: sweep.run, Tag.PHASE: "trial", Tag.TRIAL: str(number)}
    known = tracking.find_run(sweep.uri, sweep.experiment_id, key)
    if known is None:
        run_id = tracking.open_run(
            sweep.uri,
            sweep.experiment_id,
            name=name,
            parent=sweep.run_id,
            tags=key,
            params=flat_params(settings),
        )
        # A new MLflow run is RUNNING; this one waits for its turn.
        client.ask(sweep.uri, lambda client: client.update_run(run_id, status="SCHEDULED"))
        over = False
    else:
        run_id = known.run_id
        over = is_over(known)
    return Trial(number, settings, f"{sweep.run}/{name}", run_id, over)


def _run_trials(sweep: Sweep, trials: list[Trial]) -> None:
    """Runs the trials that are not over, and judges the values of all.

    Raises:
        TrainingError: all trials failed.
    """
    early_stop = _early_stop(sweep, trials)
    for trial in trials:
        if trial.over:
            _watch(sweep, trial, trial_recipe(sweep.recipe, trial.settings), early_stop)
    calls: dict[str, Callable[[], None]] = {
        trial.run: lambda trial=trial: _run_trial(sweep, trial, early_stop)  # type: ignore[misc]
        for trial in trials
        if not trial.over
    }
    with early_stop.judging() if early_stop else nullcontext():
        failed = in_threads(calls, at_once=sweep.config.max_concurrent, stopping=sweep.stopping)
    if len(failed) == len(trials):
        name, error = next(iter(failed.items()))
        raise TrainingError(f"all {len(trials)} trials failed, {name}: {first_line(error)}")


def _early_stop(sweep: Sweep, trials: list[Trial]) -> EarlyStop | None:
    """Returns the early stop of the sweep; None if it watches no metric."""
    config, watch = sweep.config, sweep.config.watch
    if not watch:
        return None
    max_epochs = sweep.recipe.pretrain.epochs
    for trial in trials:
        epochs = trial.settings.get("pretrain.epochs")
        if isinstance(epochs, int):
            max_epochs = max(max_epochs, epochs)
    metric = watch
    if watch != KNN:
        metric = f"curve/{watch}/{headline_metric(sweep.recipe.transfers[watch])}"
    rule = Halving(
        max_epochs=max_epochs, grace_epochs=config.grace_epochs, reduction=config.reduction
    )
    return EarlyStop(
        sweep.uri, sweep.experiment_id, metric=metric, reduction=config.reduction, rule=rule
    )


def _run_trial(sweep: Sweep, trial: Trial, early_stop: EarlyStop | None) -> None:
    """Runs one trial, from its settings to its objective, and records how it ended."""
    uri = sweep.uri
    tracking.reopen_run(uri, trial.run_id)
    try:
        with closing_run(uri, trial.run_id, sweep.stopping):
            recipe = trial_recipe(sweep.recipe, trial.settings)
            _watch(sweep, trial, recipe, early_stop)
            tags = sweep.tags | {"mlflow.parentRunId": trial.run_id, Tag.SWEEP: sweep.run}
            pretrain_then_transfer(
                recipe,
                indexes=sweep.indexes,
                run=trial.run,
                storage=sweep.storage,
                fresh=sweep.fresh,
                tags=tags,
            )
            values = [
                row.value
                for row in run_results(uri, trial.run).rows
                if row.transfer == sweep.config.objective
            ]
            _log_objective(uri, trial.run_id, sum(values) / len(values))
    except StoppedError as error:
        _close_stopped(sweep, trial, error)
    finally:
        if early_stop:
            early_stop.end(trial.number)


def _watch(sweep: Sweep, trial: Trial, recipe: Recipe, early_stop: EarlyStop | None) -> None:
    """Records a trial's steps per epoch, and adds the trial to the early stop.

    Raises:
        ConfigError: its settings do not fit the data.
    """
    per_epoch = steps_per_epoch(
        sweep.data, recipe.data.pretrain_split, pretraining_plan(recipe.pretrain)
    )
    tracking.set_tags(sweep.uri, trial.run_id, {Tag.STEPS_PER_EPOCH: str(per_epoch)})
    if early_stop is None:
        return
    watched = Watched(
        number=trial.number,
        run=trial.run,
        run_id=trial.run_id,
        url=join_url(sweep.storage, trial.run, "pretrain"),
        epochs=recipe.pretrain.epochs,
        steps_per_epoch=per_epoch if sweep.config.watch == KNN else 1,  # a curve's steps are epochs
        live=not trial.over,
    )
    early_stop.add(watched)


def _log_objective(uri: str, run_id: str, value: float) -> None:
    point = MetricPoint(key=OBJECTIVE, value=value, timestamp=time.time_ns() // 1_000_000, step=0)
    metric_queue.send_points(uri, run_id, [point], patience_s=60.0)


def _close_stopped(sweep: Sweep, trial: Trial, error: StoppedError) -> None:
    """Marks a stopped trial, its run and its pretraining as KILLED: they have not failed."""
    reason = first_line(error).partition(";")[0]
    for facts in tracking.search(sweep.uri, sweep.experiment_id, {Tag.RUN: trial.run}):
        if facts.tags.get(Tag.ERROR, "").startswith(reason):
            tracking.close_run(sweep.uri, facts.run_id, "KILLED")
    tracking.set_tags(sweep.uri, trial.run_id, {Tag.STOPPED: "true", Tag.ERROR: reason})
    tracking.close_run(sweep.uri, trial.run_id, "KILLED")


def _close_interrupted(sweep: Sweep, trials: list[Trial]) -> None:
    """Marks the trials that MLflow has as running as KILLED."""
    for trial in (trial for trial in trials if not trial.over):
        close_running(sweep.uri, trial.run)
        if tracking.run_facts(sweep.uri, trial.run_id).status == "RUNNING":
            tracking.set_tags(sweep.uri, trial.run_id, {Tag.ERROR: "interrupted"})
            tracking.close_run(sweep.uri, trial.run_id, "KILLED")
