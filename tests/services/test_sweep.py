"""Sweeps: the space, ASHA's decisions, stopped pretrainings, and a sweep on a real Ray."""

import dataclasses
import math

import pytest
import torch

from hemoco.config import (
    Choice,
    DataConfig,
    LogUniform,
    SweepConfig,
    Uniform,
    config_digest,
)
from hemoco.config.sweep import with_settings
from hemoco.data.shards.index import ShardIndexes
from hemoco.errors import ConfigError, TrainingError, UsageError
from hemoco.results.sweep import sweep_result
from hemoco.storage.objects import exists, join_url, list_names
from hemoco.tracking.client import connect
from hemoco.tracking.runs import metric_history, open_run, run_facts
from jobs.cli import main
from jobs.demo_data import write_digits
from jobs.options import SweepOptions, parse_options, run_name
from pipeline.pretrain import PretrainJob, pretrain_worker
from pipeline.sweep.early_stop import EarlyStop, Halving, Watched
from pipeline.sweep.sweep import drawn_settings, run_sweep, trial_recipe
from pipeline.workers.interruption import TrainingProcess
from pipeline.workers.stop_request import StoppedError, request_stop
from tests.helpers.made_sweep import LR, RECIPE, SPACE, SWEEP, TEMPERATURE, record
from tests.helpers.whole_stages import pack


def searching(**changes):
    return dataclasses.replace(RECIPE, sweep=dataclasses.replace(SWEEP, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {"pretrain.optimiser.lr": SPACE[LR]}}, "did you mean pretrain.optimizer.lr?"),
        ({"space": {"temperature": SPACE[TEMPERATURE]}}, "did you mean pretrain.moco.temperature?"),
        (
            {"space": {"pretrain.optimizer": SPACE[LR]}},
            "is a group: name one of pretrain.optimizer.kind",
        ),
        (
            {"space": {"transfers.knn.neighbours": Choice((5,))}, "trials": 1},
            "names 'transfers.knn.neighbours'",
        ),
        (
            {"space": {"pretrain.resources.workers": Choice((1,))}, "trials": 1},
            "not how that is computed or measured",
        ),
        (
            {"space": {"pretrain.knn_every_epochs": Choice((1,))}, "trials": 1},
            "not how that is computed or measured",
        ),
        ({"space": {"pretrain.epochs": Uniform(1, 9)}}, "which is int: give a Choice"),
        (
            {"space": {"pretrain.moco.head": Choice(("mlp", "mpl"))}, "trials": 2},
            r"has \['mpl'\] .* 'linear', 'mlp'",
        ),
        (
            {"space": {LR: Choice((0.1, True))}, "trials": 2},
            r"has \[True\] for pretrain.optimizer.lr: float",
        ),
        (
            {"space": {"pretrain.views.blur": Choice(((1.0,),))}, "trials": 1},
            "tuple.float, float. is allowed",
        ),
        ({"space": {LR: (0.1, 0.2)}}, "must be a Choice, Uniform or LogUniform"),
        ({"space": {LR: Choice((0.1, 0.2))}, "trials": 3}, "has 2 points"),
        ({"space": {}}, "sweep.space is empty"),
        ({"objective": "probe"}, r"sweep.objective is 'probe'.*linear_probe"),
        ({"watch": "knn"}, "sweep.watch is 'knn': knn_top1"),
        ({"grace_epochs": 9}, "sweep.grace_epochs is 9: pretrain.epochs is 8"),
        ({"reduction": 1}, "sweep.reduction is 1"),
    ],
)
def test_sweep_that_cannot_work_is_refused_when_it_is_built(change, message):
    with pytest.raises(ConfigError, match=message):
        searching(**change)


@pytest.mark.parametrize(
    "build", [lambda: Uniform(1, 1), lambda: LogUniform(0, 1), lambda: Choice((1, 1))]
)
def test_empty_range_is_refused(build):
    with pytest.raises(ConfigError):
        build()


def test_sweep_watching_what_is_not_measured_is_refused():
    with pytest.raises(ConfigError, match=r"pretrain\.knn_every_epochs is 0"):
        dataclasses.replace(
            RECIPE, pretrain=dataclasses.replace(RECIPE.pretrain, knn_every_epochs=0)
        )


def test_drawn_settings_are_in_their_ranges_and_those_of_the_seed():
    drawn = drawn_settings(dataclasses.replace(SWEEP, trials=40))
    assert drawn == drawn_settings(dataclasses.replace(SWEEP, trials=40))
    assert drawn != drawn_settings(dataclasses.replace(SWEEP, trials=40, seed=1))
    assert all(0.01 <= point[LR] <= 1 and 0.1 <= point[TEMPERATURE] <= 0.4 for point in drawn)
    assert {point["pretrain.moco.head"] for point in drawn} == {"linear", "mlp"}


def test_log_uniform_draws_as_many_small_values_as_large_ones():
    drawn = drawn_settings(dataclasses.replace(SWEEP, trials=400))
    below = sum(point[LR] < 0.1 for point in drawn)  # 0.1 is the middle of the logarithms
    assert abs(below - 200) < 5 * math.sqrt(100)  # 5 standard deviations of a fair coin


def test_more_trials_begin_with_the_same_ones():
    assert drawn_settings(dataclasses.replace(SWEEP, trials=9))[:6] == drawn_settings(SWEEP)


def test_space_of_choices_is_tried_whole_before_anything_is_repeated():
    space = {
        LR: Choice((0.1, 0.2)),
        "pretrain.views.crop_scale": Choice(((0.1, 1.0), (0.2, 1.0), (0.3, 1.0))),
    }
    drawn = drawn_settings(dataclasses.replace(SWEEP, space=space, trials=6))
    assert len({tuple(point.values()) for point in drawn}) == 6


def test_settings_are_changed_together_before_they_are_checked():
    changed = with_settings(
        RECIPE, {"pretrain.global_batch_size": 96, "pretrain.moco.queue_length": 192}
    )
    assert (changed.pretrain.global_batch_size, changed.pretrain.moco.queue_length) == (96, 192)
    assert dataclasses.replace(changed, pretrain=RECIPE.pretrain) == RECIPE
    with pytest.raises(ConfigError, match="queue_length is 256"):
        with_settings(RECIPE, {"pretrain.global_batch_size": 96})


def test_trial_measures_the_objective_from_its_own_backbone_alone():
    trial = trial_recipe(searching(objective="linear_probe"), {LR: 0.5})
    assert trial.pretrain.optimizer.lr == 0.5 and trial.sweep is None
    assert {name: config.inits for name, config in trial.transfers.items()} == {
        "linear_probe": ("pretrained",)
    }


def test_a_sweep_beside_a_recipe_does_not_make_its_run_another():
    assert config_digest(RECIPE) == config_digest(dataclasses.replace(RECIPE, sweep=None))


def test_more_trials_are_the_same_sweep_and_another_seed_is_not():
    names = [
        run_name(SweepOptions(recipe=searching(**c))) for c in ({}, {"trials": 9}, {"seed": 1})
    ]
    assert names[0] == names[1] != names[2]


def test_settings_of_a_sweep_are_typed_as_all_others():
    words = ["cifar10_resnet18_sweep", "--sweep.trials", "3", f"--sweep.space.{LR}.low", "0.02"]
    sweep = parse_options("sweep", words, SweepOptions).recipe.sweep
    assert (sweep.trials, sweep.space[LR].low) == (3, 0.02)


def test_recipe_without_a_sweep_is_wrong_usage(capsys):
    assert main(["sweep", "demo"]) == 2
    assert "recipe demo has no sweep: give it one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "bad"),
    [
        ([("a", 1, 0.5)], False),  # nobody to compare with
        ([("a", 1, 0.5), ("b", 1, 0.4)], True),
        ([("a", 1, 0.5), ("b", 1, 0.6)], False),
        ([("a", 1, 0.5), ("b", 1, 0.4), ("c", 1, 0.46)], False),  # the better half begins at 0.45
        ([("a", 1, 0.5), ("b", 1, 0.4), ("c", 1, 0.44)], True),
        (
            [("a", 1, 0.5), ("a", 2, 0.7), ("b", 1, 0.6), ("b", 2, 0.6)],
            True,
        ),  # each milestone has its own values
        (
            [("a", 1, 0.5), ("a", 2, 0.7), ("b", 1, 0.6), ("b", 2, 0.8), ("b", 3, 0.0)],
            False,
        ),  # 3 is no milestone
        ([("a", 1, 0.5), ("a", 2, 0.7), ("b", 3, 0.6)], True),  # what comes late is judged at 2
        ([("a", 2, 0.7), ("b", 3, 0.8), ("b", 3, 0.1)], False),  # once at each
    ],
)
def test_asha_stops_what_is_not_in_the_better_half_at_a_milestone(told, bad):
    rule = Halving(max_epochs=8, grace_epochs=1, reduction=2)
    assert [rule.is_bad(*point) for point in told][-1] is bad


def test_nothing_is_stopped_before_the_grace_epochs():
    rule = Halving(max_epochs=8, grace_epochs=3, reduction=2)
    assert not any(
        rule.is_bad(name, epoch, value)
        for epoch in (1, 2)
        for name, value in (("a", 0.9), ("b", 0.1))
    )
    assert [rule.is_bad(name, 3, value) for name, value in (("a", 0.9), ("b", 0.1))] == [
        False,
        True,
    ]


def watched(uri, folder, number, values, **changes):
    """Returns a trial of 8 epochs of 10 steps; its pretraining has these accuracies by epoch."""
    run, experiment = f"{folder}/trial_{number}", connect(uri)
    tags = {"hemoco.run": run, "hemoco.phase": "pretrain"}
    pretraining = open_run(uri, experiment, name="pretrain", parent=None, tags=tags, params={})
    record(
        uri, pretraining, "knn_top1", [(10 * epoch, value) for epoch, value in enumerate(values, 1)]
    )
    run_id = open_run(uri, experiment, name=f"trial_{number}", parent=None, tags={}, params={})
    facts = {
        "number": number,
        "run": run,
        "run_id": run_id,
        "url": join_url(folder, str(number)),
        "epochs": 8,
    }
    return Watched(**facts | {"steps_per_epoch": 10, "live": True} | changes)


@pytest.fixture
def judge(tracking):
    rule = Halving(max_epochs=8, grace_epochs=1, reduction=2)
    return EarlyStop(tracking, connect(tracking), metric="knn_top1", reduction=2, rule=rule)


def test_bad_trial_is_asked_to_stop_and_its_run_says_why(judge, tracking, tmp_path):
    good, bad = (
        watched(tracking, str(tmp_path), *facts) for facts in ((0, [0.5, 0.6]), (1, [0.2]))
    )
    for trial in (good, bad):
        judge.add(trial)
    judge.look()
    assert (exists(join_url(good.url, "stop")), exists(join_url(bad.url, "stop"))) == (False, True)
    verdict = run_facts(tracking, bad.run_id).tags["hemoco.verdict"]
    assert verdict == "knn_top1 0.2000 at epoch 1 is not among the best 1/2 so far"


def test_trial_has_the_watched_values_by_epoch_once(judge, tracking, tmp_path):
    trial = watched(tracking, str(tmp_path), 0, [0.5, 0.6])
    judge.add(trial)
    judge.look()
    again = EarlyStop(tracking, connect(tracking), metric="knn_top1", reduction=2, rule=judge.rule)
    again.add(dataclasses.replace(trial, judged=set()))
    again.look()
    assert metric_history(tracking, trial.run_id, "knn_top1") == [(1, 0.5), (2, 0.6)]


def test_trial_that_is_over_is_compared_with_and_never_stopped(judge, tracking, tmp_path):
    over = watched(tracking, str(tmp_path), 0, [0.5], live=False)
    last = watched(tracking, str(tmp_path), 1, [0.4], live=False)
    new = watched(tracking, str(tmp_path), 2, [0.3])
    for trial in (over, last, new):
        judge.add(trial)
    judge.look()
    assert [exists(join_url(trial.url, "stop")) for trial in (over, last, new)] == [
        False,
        False,
        True,
    ]


def test_trial_that_has_done_all_epochs_is_left_to_its_transfer(judge, tracking, tmp_path):
    good = watched(tracking, str(tmp_path), 0, [0.5])
    done = watched(tracking, str(tmp_path), 1, [0.2], epochs=1)
    for trial in (good, done):
        judge.add(trial)
    judge.look()
    assert not exists(join_url(done.url, "stop"))


@pytest.fixture(scope="module")
def recipe(s3, ray_cluster, tracking, tmp_path_factory):
    """URL of shards of the digits on S3."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 0)
    url = join_url(s3, "sweep/digits")
    pack((str(folder),), url, split="train", samples_per_shard=500, seed=0)
    return dataclasses.replace(RECIPE, data=DataConfig(shards=url))


def test_pretraining_that_is_asked_to_stop_says_who_asked_and_when(recipe, bucket, tracking):
    tags = {"hemoco.run": bucket, "hemoco.phase": "pretrain"}
    run_id = open_run(
        tracking, connect(tracking), name="pretrain", parent=None, tags=tags, params={}
    )
    config = dataclasses.replace(recipe.pretrain, knn_every_epochs=0)
    job = PretrainJob(
        config=config, data=recipe.data, url=bucket, tracking_uri=tracking, run_id=run_id
    )
    request_stop(bucket, "the sweep")
    with pytest.raises(
        StoppedError, match=r"stopped by the sweep at epoch [01]; remove the file .*/stop to let it"
    ):
        pretrain_worker(job, TrainingProcess(torch.device("cpu"), config.resources, [1]))
    assert "backbone.safetensors" not in list_names(bucket)


def test_trials_with_an_invalid_config_fail_with_their_reason(recipe, bucket, tracking):
    sweep = SweepConfig(
        space={"pretrain.global_batch_size": Choice((96, 65))}, objective="knn", trials=2
    )
    bad = dataclasses.replace(recipe, sweep=sweep)
    with pytest.raises(TrainingError, match="all 2 trials failed, invalid/trial_000"):
        run_sweep(bad, indexes=ShardIndexes(), run="invalid", storage=bucket, fresh=False, tags={})
    trials = sweep_result(tracking, "invalid").trials
    assert {(trial.outcome, trial.epochs) for trial in trials} == {("failed", 0)}
    assert {trial.reason.partition(":")[0] for trial in trials} == {
        "pretrain.moco.queue_length is 256",
        "pretrain.stream.lanes is 8",
    }


def test_sweep_with_another_search_under_an_old_name_is_refused(recipe, bucket, tracking):
    sweep = SweepConfig(
        space={"pretrain.global_batch_size": Choice((96,))}, objective="knn", trials=1
    )
    for seed, error in ((0, TrainingError), (1, UsageError)):
        other = dataclasses.replace(recipe, sweep=dataclasses.replace(sweep, seed=seed))
        with pytest.raises(error, match=r"all 1 trials|its sweep.seed: 0 -> 1"):
            run_sweep(
                other, indexes=ShardIndexes(), run="renamed", storage=bucket, fresh=False, tags={}
            )
