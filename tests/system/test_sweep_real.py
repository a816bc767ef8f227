"""A sweep as a user runs it: eight pretrainings on scanned digits, most with bad learning rates.

This file is also the recipe. The results are read from MLflow by MLflow's own client.
"""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from hemoco.config import (
    Choice,
    DataConfig,
    EncoderConfig,
    KnnConfig,
    MoCoConfig,
    OptimizerConfig,
    PretrainConfig,
    Recipe,
    StreamConfig,
    SweepConfig,
    ViewsConfig,
)
from hemoco.data.shards.index import Shard, ShardIndex, ShardIndexes, write_index, write_table
from hemoco.data.shards.tar import Sample, encode_shard, parse_tar
from hemoco.storage.objects import join_url, write_bytes
from jobs.demo_data import split_digits
from jobs.options import load_recipe
from pipeline.sweep.sweep import drawn_settings, run_sweep

ROOT = Path(__file__).parents[2]
LR, NAME = "pretrain.optimizer.lr", "swept-for-real"
GOOD = (0.001, 0.003)  # kNN after two epochs: at least 0.86
BAD = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # kNN after two epochs: at most 0.65
SAMPLES = {"train": 60, "test": 40}  # of each digit
EPOCHS, STEPS = 50, 450
recipe = Recipe(
    name="scanned",
    pretrain=PretrainConfig(
        epochs=EPOCHS,  # long enough that no trial ends before it sees a request to stop
        global_batch_size=64,
        log_every_steps=3,
        checkpoint_every_steps=STEPS,
        knn_every_epochs=1,
        views=ViewsConfig(size=16, crop_scale=(0.5, 1.0), flip=0.0),
        encoder=EncoderConfig(architecture="resnet10t"),
        moco=MoCoConfig(
            head="mlp_bn", queue_length=128, momentum=0.97, temperature=0.1, bn_group_size=32
        ),
        optimizer=OptimizerConfig(weight_decay=5e-4),
        stream=StreamConfig(workers=0, lanes=4),
    ),
    transfers={"knn": KnnConfig(neighbours=20)},
    # with this seed the good ones come first, so that the others are compared with them
    sweep=SweepConfig(
        space={LR: Choice(GOOD + BAD)}, objective="knn", trials=8, seed=30, grace_epochs=2
    ),
)


def write_scans(url):
    """Shards of scikit-learn's digits as they are, on 16 x 16 pixels."""
    shards = []
    for split, digits in split_digits(0).items():
        some = []
        for label in range(10):
            some += [digit for digit in digits if digit.label == label][: SAMPLES[split]]
        order = np.random.default_rng(0).permutation(len(some))
        data = encode_shard(
            [
                Sample(f"{split}{row}", png(some[row].ink), some[row].label, suffix="png")
                for row in order
            ]
        )
        shard = Shard(
            f"{split}-000000.tar", split, len(some), len(data), hashlib.sha256(data).hexdigest()
        )
        write_bytes(join_url(url, shard.name), data)
        write_table(url, shard, parse_tar(data, shard.name).table)
        shards.append(shard)
    write_index(url, ShardIndex(tuple(shards), tuple("0123456789"), ()))


def png(ink):
    buffer = io.BytesIO()
    Image.fromarray((255 * ink).astype(np.uint8)).convert("RGB").resize((16, 16)).save(
        buffer, "png"
    )
    return buffer.getvalue()


@pytest.fixture(scope="module")
def words(s3):
    """The arguments of `sweep`, with everything on S3."""
    shards = join_url(s3, "sweep_real/shards")
    write_scans(shards)
    return [
        __file__,
        "--run",
        NAME,
        "--data.shards",
        shards,
        "--storage",
        join_url(s3, "sweep_real/runs"),
    ]


@pytest.fixture(scope="module")
def output(words, tracking, tmp_path_factory):
    """The output of a finished sweep."""
    assert {point[LR] for point in drawn_settings(recipe.sweep)[:2]} == set(GOOD)
    environment = os.environ | {"HEMOCO_HOME": str(tmp_path_factory.mktemp("home"))}
    command = [sys.executable, "-m", "jobs", "sweep", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def client(output, tracking):
    """A client of the MLflow that holds the sweep."""
    return MlflowClient(tracking)


def search(client, **tags):
    wanted = " and ".join(
        f"tags.`{name.replace('__', '.')}` = '{value}'" for name, value in tags.items()
    )
    return list(client.search_runs([client.get_experiment_by_name("hemoco").experiment_id], wanted))


def trials_of(client, **tags):
    (sweep,) = search(client, hemoco__sweep=NAME, hemoco__phase="sweep")
    return search(client, mlflow__parentRunId=sweep.info.run_id, **tags)


def stopped_of(client):
    return trials_of(client, hemoco__stopped="true")


def finished_of(client):
    return [trial for trial in trials_of(client) if trial.info.status == "FINISHED"]


def run_below(client, trial, phase):
    (run,) = search(client, hemoco__run=f"{NAME}/{trial.info.run_name}", hemoco__phase=phase)
    return run


def steps_of(client, trial):
    return max(
        point.step
        for point in client.get_metric_history(
            run_below(client, trial, "pretrain").info.run_id, "loss"
        )
    )


def lr_of(trial):
    return float(trial.data.params[LR])


def test_each_of_eight_trials_is_a_child_run_with_its_own_setting(client):
    trials = trials_of(client)
    assert sorted(map(lr_of, trials)) == sorted(GOOD + BAD)
    below = {run_below(client, trial, "parent").data.tags["mlflow.parentRunId"] for trial in trials}
    assert below == {trial.info.run_id for trial in trials}


def test_every_bad_trial_is_stopped_and_every_other_finishes(client):
    stopped = set(map(lr_of, stopped_of(client)))
    assert stopped >= set(BAD)
    assert set(map(lr_of, finished_of(client))) == set(GOOD + BAD) - stopped != set()


def test_stopped_trials_have_trained_for_fewer_steps(client):
    assert {steps_of(client, trial) for trial in finished_of(client)} == {STEPS}
    assert all(
        2 * STEPS / EPOCHS <= steps_of(client, trial) < STEPS for trial in stopped_of(client)
    )


def test_runs_of_a_stopped_trial_are_killed_and_say_by_whom_and_when(client):
    for trial in stopped_of(client):
        runs = [trial, run_below(client, trial, "parent"), run_below(client, trial, "pretrain")]
        epoch = steps_of(client, trial) * EPOCHS // STEPS
        assert {run.info.status for run in runs} == {"KILLED"}
        errors = {run.data.tags["hemoco.error"].partition(";")[0] for run in runs}
        assert errors == {f"stopped by the sweep at epoch {epoch}"}
        assert "is not among the best 1/4 so far" in trial.data.tags["hemoco.verdict"]


def test_objective_is_what_the_transfer_of_the_trial_has_measured(client):
    for trial in finished_of(client):
        measured = run_below(client, trial, "transfer").data.metrics["pretrained/seed_0/top1"]
        assert trial.data.metrics["objective"] == measured > 0.8


def test_stopped_trials_have_no_objective(client):
    assert not any("objective" in trial.data.metrics for trial in stopped_of(client))


def test_summary_names_the_best_trial(client, output):
    ranked = {
        (-trial.data.metrics["objective"], int(trial.data.tags["hemoco.trial"])): trial
        for trial in finished_of(client)
    }
    (_, number), best = min(ranked.items())
    assert f"best        trial {number}, {NAME}/{best.info.run_name}" in output.splitlines()
    (sweep,) = search(client, hemoco__sweep=NAME, hemoco__phase="sweep")
    path = client.download_artifacts(sweep.info.run_id, "sweep.json")
    assert json.loads(Path(path).read_text())["best"] == number


def test_same_words_again_run_no_trial_again(client, words):
    before = {run.info.run_id: run.info.end_time for run in search(client, hemoco__sweep=NAME)}
    shards, storage = words[4], words[6]
    again = dataclasses.replace(load_recipe(__file__), data=DataConfig(shards=shards))
    run_sweep(again, indexes=ShardIndexes(), run=NAME, storage=storage, fresh=False, tags={})
    after = {run.info.run_id: run.info.end_time for run in search(client, hemoco__sweep=NAME)}
    (sweep,) = search(client, hemoco__sweep=NAME, hemoco__phase="sweep")
    assert {run for run in before if before[run] != after[run]} == {sweep.info.run_id}
    assert len(after) == len(before)
