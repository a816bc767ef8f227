"""A sweep: pretrainings that differ in some settings, each with the transfer that is to get better.

Ray Tune draws the settings and decides by ASHA which trials stop; it does not run them. Its Tuner would: every trial in
an actor of its own, as a second driver with its own copies of torch and MLflow, ended by killing that actor, which
could then not say in MLflow what became of it; its experiment state in files beside MLflow, and no way to tell ASHA of
trials that have finished before. Here a trial is a run as every other, found by its name and resumed by the same words,
one thread of this driver each, and a bad one is asked to stop.
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
    """Its run in MLflow, the parent of its trials."""
    storage: str
    indexes: ShardIndexes
    data: ShardIndex
    fresh: bool
    tags: dict[str, str]
    """Of the runs of the trials."""
    stopping: threading.Event = dataclasses.field(default_factory=threading.Event)


class Trial(NamedTuple):
    """One point of the space."""

    number: int
    settings: dict[str, object]
    run: str
    """Name of its run."""
    run_id: str
    """In MLflow, the parent of its run there."""
    over: bool


def run_sweep(
    recipe: Recipe,
    *,
    indexes: ShardIndexes,
    run: str,
    storage: str,
    fresh: bool,
    tags: dict[str, str],
) -> None:
    """All trials; the result is in MLflow, where `hemoco.results.sweep` reads it. What is over is not done again.

    Args:
        recipe: with a `sweep`, and absolute URLs.
        indexes: of this command.
        run: the sweep's identity; the trials are the runs `RUN/trial_0000`, ...
        storage: URL of the folder that receives checkpoints and backbones.
        fresh: forget what is there under that name.
        tags: of its run and those of the trials in MLflow, for example the commit of the code.

    Raises:
        UsageError: the name belongs to another sweep or to a run, or another process is at it.
        TrainingError: no trial came to its end.
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
                _close_interrupted(sweep, trials)  # what a killed driver has left
                _try_all(sweep, trials)
        finally:
            if (
                sweep.stopping.is_set()
            ):  # the threads that would have told MLflow end with this process
                with suppress(TrackingError):  # it was told to end, and that is what it says
                    _close_interrupted(sweep, trials)


def drawn_settings(config: SweepConfig) -> list[dict[str, object]]:
    """The settings of each trial, by Tune's search space and the seed; of more trials the first ones are the same."""
    generator = np.random.default_rng(config.seed)
    countable = all(isinstance(values, Choice) for values in config.space.values())
    drawn: list[dict[str, object]] = []
    while len(drawn) < config.trials:
        point = {name: _drawn(values, generator) for name, values in config.space.items()}
        if not countable or point not in drawn:
            drawn.append(point)
    return drawn


def trial_recipe(recipe: Recipe, settings: dict[str, object]) -> Recipe:
    """The recipe with these settings, and of its transfers what the sweep looks at, from the pretrained backbone alone.

    Raises:
        ConfigError: the settings do not fit together.
    """
    sweep = recipe.sweep
    assert sweep is not None, "checked by the caller"
    names = dict.fromkeys(
        (sweep.objective, *(name for name in recipe.curve if name == sweep.watch))
    )
    transfers = {
        name: dataclasses.replace(recipe.transfers[name], inits=(PRETRAINED,)) for name in names
    }
    curve = tuple(name for name in recipe.curve if name == sweep.watch)
    return with_settings(
        dataclasses.replace(recipe, sweep=None, transfers=transfers, curve=curve), settings
    )


def _drawn(values: Range, generator: np.random.Generator) -> object:
    if isinstance(values, Choice):
        return tune.choice(list(values.values)).sample(random_state=generator)
    domain = tune.uniform if isinstance(values, Uniform) else tune.loguniform
    number = float(f"{domain(values.low, values.high).sample(random_state=generator):.4g}")
    return min(max(number, values.low), values.high)


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
    data, uri, params = indexes.at(recipe.data.shards), client.tracking_uri(), flat_params(recipe)
    experiment_id = client.connect(uri)
    if tracking.find_run(uri, experiment_id, {Tag.RUN: run, Tag.PHASE: "parent"}) is not None:
        raise UsageError(
            f"{run!r} is the name of a run, whose folder would be the sweep's: choose another --run name"
        )
    key, url = {Tag.SWEEP: run, Tag.PHASE: "sweep"}, join_url(storage, run)
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
                f"sweep {run!r} exists with other settings ({'; '.join(difference[:5])}): choose another --run name, "
                "or --fresh to start it anew"
            )
        url = same_folder(known, run, url)
        tracking.reopen_run(uri, run_id)
    # the last code that worked at it counts; the folder is where `status` says that it goes on
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
    """Refuses to begin anew where the folder of a trial is not its own, before anything is forgotten or removed."""
    there = set(list_names(url))
    for name in map(_trial_name, range(trials)):
        if name in there:
            check_run_folder(join_url(url, name), f"{run}/{name}")


def _trial_name(number: int) -> str:
    return f"trial_{number:04d}"


def _open_trial(sweep: Sweep, number: int, settings: dict[str, object]) -> Trial:
    name = _trial_name(number)
    key = {Tag.SWEEP: sweep.run, Tag.PHASE: "trial", Tag.TRIAL: str(number)}
    known = tracking.find_run(sweep.uri, sweep.experiment_id, key)
    if known is None:
        run_id = tracking.open_run(
            *(sweep.uri, sweep.experiment_id),
            name=name,
            parent=sweep.run_id,
            tags=key,
            params=flat_params(settings),
        )
        # until its turn comes
        client.ask(sweep.uri, lambda client: client.update_run(run_id, status="SCHEDULED"))
    else:
        run_id = known.run_id
    return Trial(
        number, settings, f"{sweep.run}/{name}", run_id, known is not None and is_over(known)
    )


def _try_all(sweep: Sweep, trials: list[Trial]) -> None:
    judge = _judge(sweep, trials)
    for trial in trials:
        if trial.over:
            _enter(sweep, trial, trial_recipe(sweep.recipe, trial.settings), judge)
    calls: dict[str, Callable[[], None]] = {
        trial.run: lambda trial=trial: _try(sweep, trial, judge)  # type: ignore[misc]
        for trial in trials
        if not trial.over
    }
    with judge.judging() if judge else nullcontext():
        failed = in_threads(calls, at_once=sweep.config.max_concurrent, stopping=sweep.stopping)
    if len(failed) == len(trials):
        name, error = next(iter(failed.items()))
        raise TrainingError(f"all {len(trials)} trials failed, {name}: {first_line(error)}")


def _judge(sweep: Sweep, trials: list[Trial]) -> EarlyStop | None:
    """What stops trials early; None where nothing is watched."""
    config, watch = sweep.config, sweep.config.watch
    if not watch:
        return None
    epochs = [trial.settings.get("pretrain.epochs") for trial in trials]
    longest = max(
        sweep.recipe.pretrain.epochs, *(number for number in epochs if isinstance(number, int)), 1
    )
    return EarlyStop(
        sweep.uri,
        sweep.experiment_id,
        metric=KNN
        if watch == KNN
        else f"curve/{watch}/{headline_metric(sweep.recipe.transfers[watch])}",
        reduction=config.reduction,
        rule=Halving(
            max_epochs=longest, grace_epochs=config.grace_epochs, reduction=config.reduction
        ),
    )


def _try(sweep: Sweep, trial: Trial, judge: EarlyStop | None) -> None:
    """One trial, from its settings to its objective; a failure is its own."""
    uri = sweep.uri
    tracking.reopen_run(uri, trial.run_id)
    try:
        with closing_run(uri, trial.run_id, sweep.stopping):
            recipe = trial_recipe(sweep.recipe, trial.settings)
            _enter(sweep, trial, recipe, judge)
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
        if judge:
            judge.end(trial.number)


def _enter(sweep: Sweep, trial: Trial, recipe: Recipe, judge: EarlyStop | None) -> None:
    """Has the trial's values judged.

    Raises:
        ConfigError: its settings do not fit the data.
    """
    per_epoch = steps_per_epoch(
        sweep.data, recipe.data.pretrain_split, pretraining_plan(recipe.pretrain)
    )
    tracking.set_tags(sweep.uri, trial.run_id, {Tag.STEPS_PER_EPOCH: str(per_epoch)})
    if judge is None:
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
    judge.add(watched)


def _log_objective(uri: str, run_id: str, value: float) -> None:
    point = MetricPoint(key=OBJECTIVE, value=value, timestamp=time.time_ns() // 1_000_000, step=0)
    metric_queue.send_points(uri, run_id, [point], patience_s=60.0)


def _close_stopped(sweep: Sweep, trial: Trial, error: StoppedError) -> None:
    """A trial that was stopped has not failed, and neither have its run and its pretraining."""
    reason = first_line(error).partition(";")[0]
    for facts in tracking.search(sweep.uri, sweep.experiment_id, {Tag.RUN: trial.run}):
        if facts.tags.get(Tag.ERROR, "").startswith(reason):
            tracking.close_run(sweep.uri, facts.run_id, "KILLED")
    tracking.set_tags(sweep.uri, trial.run_id, {Tag.STOPPED: "true", Tag.ERROR: reason})
    tracking.close_run(sweep.uri, trial.run_id, "KILLED")


def _close_interrupted(sweep: Sweep, trials: list[Trial]) -> None:
    for trial in (trial for trial in trials if not trial.over):
        close_running(sweep.uri, trial.run)
        if tracking.run_facts(sweep.uri, trial.run_id).status == "RUNNING":
            tracking.set_tags(sweep.uri, trial.run_id, {Tag.ERROR: "interrupted"})
            tracking.close_run(sweep.uri, trial.run_id, "KILLED")
