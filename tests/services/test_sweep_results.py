"""Results of sweeps as the pipeline records them: table, status and messages."""

import json
import os
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

import jobs.options
from hemoco.config import flat_params
from hemoco.errors import UsageError
from hemoco.report.extra_tables import sweep_section
from hemoco.results.status import close_running
from hemoco.results.sweep import sweep_json, sweep_result
from hemoco.tracking.client import connect
from hemoco.tracking.runs import open_run, set_tags
from jobs.cli import main
from jobs.options import SweepOptions, parse_options
from jobs.recorded_command import RecordedCommand, command_tags
from jobs.verbs.submit import parse_request
from jobs.verbs.sweep import best_trial_commands
from tests.helpers.made_sweep import LR, RECIPE, record


@pytest.fixture
def made(tracking):
    """A sweep of four trials in MLflow: two finished, one stopped, one that could not be built."""
    experiment = connect(tracking)
    name = f"made-{time.time_ns()}"
    tags = {"hemoco.recipe": "swept", "hemoco.data_digest": "d", "hemoco.metric": "top1"}
    key = {"hemoco.sweep": name, "hemoco.phase": "sweep"}
    open_run(
        tracking, experiment, name=name, parent=None, tags=key | tags, params=flat_params(RECIPE)
    )
    rows = [
        ("FINISHED", 0.4, 8, {}),
        ("FINISHED", 0.6, 8, {}),
        ("KILLED", None, 2, {"hemoco.stopped": "true"}),
    ]
    for number, (status, value, epochs, more) in enumerate(
        [*rows, ("FAILED", None, 0, {"hemoco.error": "no"})]
    ):
        shown = f"trial_{number:04d}"
        own = {"hemoco.sweep": name, "hemoco.phase": "trial", "hemoco.trial": str(number)}
        own |= {"hemoco.steps_per_epoch": "10"} | more
        run_id = open_run(
            tracking, experiment, name=shown, parent=None, tags=own, params={LR: str(number / 10)}
        )
        if epochs:
            below = {
                "hemoco.run": f"{name}/{shown}",
                "hemoco.phase": "pretrain",
                "hemoco.backbone_url": f"b{number}",
            }
            pretraining = open_run(
                tracking, experiment, name="pretrain", parent=run_id, tags=below, params={}
            )
            record(tracking, pretraining, "loss", [(10 * epochs, 1.0)])
        if value is not None:
            record(tracking, run_id, "objective", [(0, value)])
        MlflowClient(tracking).set_terminated(run_id, status)
    return name


def test_table_has_the_best_first_and_says_what_became_of_each(made, tracking):
    section = sweep_section(sweep_result(tracking, made))
    assert section.columns == ("trial", "optimizer.lr", "knn/top1", "epochs", "outcome", "reason")
    assert section.rows == (
        ("1", "0.1", "0.6000", "8", "finished", ""),
        ("0", "0.0", "0.4000", "8", "finished", ""),
        ("2", "0.2", "", "2", "stopped", ""),
        ("3", "0.3", "", "0", "failed", "no"),
    )


def test_json_names_the_best_and_has_null_for_what_was_not_measured(made, tracking):
    found = json.loads(sweep_json(sweep_result(tracking, made)))
    assert (found["best"], found["objective"], found["watch"]) == (1, "knn/top1", "knn_top1")
    assert [trial["objective"] for trial in found["trials"]] == [0.6, 0.4, None, None]
    assert found["trials"][0]["settings"] == {LR: "0.1"}


def test_words_of_the_best_trial_make_its_recipe_again(made, tracking, tmp_path):
    result = sweep_result(tracking, made)
    transfer, run = best_trial_commands(
        result, RecordedCommand(recipe="swept.py", settings={"sweep.seed": "1", LR: "9"})
    )
    assert transfer == f"python -m jobs transfer swept.py --backbone b1 --{LR} 0.1"
    assert run == f"python -m jobs run swept.py --{LR} 0.1"


def test_unknown_sweep_is_said_with_those_that_are_known(made, tracking):
    with pytest.raises(UsageError, match=made):
        sweep_result(tracking, "nowhere")


def test_status_of_a_sweep_shows_its_trials_and_how_to_go_on(made, capsys):
    assert main(["status", made]) == 0
    said = capsys.readouterr().out
    assert f"{made}: 4 trials of swept" in said
    assert f"best        trial 1, {made}/trial_0001" in said
    assert f"resume      the command that began it, with --run {made}" in said


def test_status_of_a_sweep_executes_no_file_that_a_tag_names(made, tracking, capsys, tmp_path):
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    )
    run_id = sweep_result(tracking, made).run_id
    by_name = os.path.relpath(tmp_path / "evil", Path(jobs.options.__file__).parent / "recipes")
    for tags in ({"hemoco.recipe": by_name}, {"hemoco.recipe_file": str(tmp_path / "evil.py")}):
        set_tags(tracking, run_id, tags)
        assert main(["status", made]) == 0
        said = capsys.readouterr().out
        assert (
            f"resume      the command that began it, with --run {made}" in said
            and "repeat it" not in said
        )
    assert not (tmp_path / "ran").exists()


def test_words_that_go_on_with_a_sweep_have_its_file_its_storage_and_all_its_trials(
    made, tracking, capsys, tmp_path
):
    (tmp_path / "swept.py").write_text("from test_sweep import RECIPE as recipe")
    argv = [str(tmp_path / "swept.py"), "--data.shards", "s3://b/shards"]
    tags = command_tags("sweep", argv[0], parse_options("sweep", argv, SweepOptions)) | {
        "hemoco.storage": f"s3://b/runs/{made}"
    }
    set_tags(tracking, sweep_result(tracking, made).run_id, tags)
    for number in range(4, 9):
        own = {"hemoco.sweep": made, "hemoco.phase": "trial", "hemoco.trial": str(number)}
        open_run(
            tracking,
            connect(tracking),
            name=f"trial_{number:04d}",
            parent=None,
            tags=own,
            params={},
        )
    assert main(["status", made]) == 0
    said = capsys.readouterr().out
    given = f"{tmp_path}/swept.py --data.shards s3://b/shards"
    assert f"jobs sweep {given} --sweep.trials 9 --run {made} --storage s3://b/runs\n" in said
    assert f"repeat it   python -m jobs run {given} --{LR} 0.1\n" in said


def test_a_trial_goes_on_by_the_words_of_its_sweep(made, tracking, capsys):
    tags = {
        "hemoco.run": f"{made}/trial_0000",
        "hemoco.phase": "parent",
        "hemoco.sweep": made,
        "hemoco.verb": "sweep",
    }
    open_run(tracking, connect(tracking), name="r", parent=None, tags=tags, params={})
    assert main(["status", f"{made}/trial_0000"]) == 0
    assert f"resume      the command that began it, with --run {made}\n" in capsys.readouterr().out


def test_a_sweep_is_one_line_among_the_runs(made, tracking, capsys):
    sweep = sweep_result(tracking, made)
    for trial in sweep.trials:
        set_tags(tracking, trial.run_id, {"mlflow.parentRunId": sweep.run_id})
    assert main(["status"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if made in line]
    assert "trials, 2 of 4 done, 1 failed, 1 stopped" in line


def test_a_sweep_that_was_ended_leaves_nothing_that_runs(made, tracking):
    own = {"hemoco.sweep": made, "hemoco.phase": "trial", "hemoco.trial": "4"}
    open_run(tracking, connect(tracking), name="trial_0004", parent=None, tags=own, params={})
    assert sorted(close_running(tracking, made)) == [
        made,
        "pretrain",
        "pretrain",
        "pretrain",
        "trial_0004",
    ]
    assert sweep_result(tracking, made).status == "KILLED"
    assert close_running(tracking, made) == []


def test_a_submitted_sweep_has_the_name_that_it_has_here():
    words = ["cifar10_resnet18_sweep", "--data.shards", "s3://b/shards", "--storage", "s3://b/runs"]
    name = parse_options("sweep", words, SweepOptions).run
    request = parse_request(["sweep", *words])
    assert (request.run, request.argv) == (name, ["sweep", *words, "--run", name])
    with pytest.raises(UsageError, match="--out would be a folder of the cluster"):
        parse_request(["sweep", *words, "--out", "/tmp/x"])
