"""Arguments of `submit`, `status` and `stop`: what they refuse, and what they send."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

import jobs.options
from cluster.local.ray import local_ray
from cluster.submit.checkout import CHECKOUT
from cluster.submit.client import Job, _joined
from cluster.submit.environment import JobSpec, job_spec, resuming_argv
from hemoco.config import flat_params
from hemoco.errors import ConfigError, ShardError, UsageError
from hemoco.results import status as run_status
from hemoco.storage.objects import join_url, write_bytes
from hemoco.tracking.client import connect
from hemoco.tracking.runs import close_run, open_run
from hemoco.train import checkpoint
from jobs.cli import main
from jobs.options import (
    RunOptions,
    TransferOptions,
    changed_settings,
    load_recipe,
    parse_options,
    settings_flags,
)
from jobs.recorded_command import command_tags
from jobs.verbs.submit import Request, _announce, _stop_command, check_here, parse_request
from tests.helpers.shard_folders import write_shards

NOWHERE = ("--address", "http://127.0.0.1:9")
RUN = ("run", "demo", "--storage", "s3://b/runs", "--data.shards", "s3://b/shards")


def error_of(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    """Runs `submit`, checks its exit status, and returns its single line of error."""
    assert main(["submit", *words]) == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_misspelt_flag_never_leaves_this_machine(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["submit", *RUN, "--pretrain.optimiser.lr", "1", *NOWHERE])
    assert ended.value.code == 2
    assert "--pretrain.optimizer.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["demo"], "these verbs run on a cluster: run, pretrain, transfer, sweep, pack, preflight"),
        (["run", "demo2"], "did you mean demo?"),
        (["run", "demo"], "--storage is missing"),
        (["run", "demo", "--storage", "runs"], "runs is a path below this folder"),
        (["pretrain", "demo", "--storage", "s3://b/runs"], "--data.shards is missing"),
        ([*RUN, "--data.shards", "../shards"], "../shards is a path below this folder"),
        ([*RUN, "--out", "/tmp/x"], "--out would be a folder of the cluster"),
        (["transfer", *RUN[1:]], "transfer needs --backbone URL"),
        (["pack", "s3://b/images"], "pack needs a SOURCE and a DEST"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_sent(capsys, words, reason):
    assert reason in error_of(capsys, 2, *words, *NOWHERE)


def test_a_recipe_outside_the_checkout_is_refused(capsys, tmp_path):
    shutil.copy(CHECKOUT / "jobs" / "recipes" / "demo.py", tmp_path / "mine.py")
    assert "lies outside the checkout" in error_of(
        capsys, 2, "run", str(tmp_path / "mine.py"), *RUN[2:], *NOWHERE
    )


@pytest.mark.parametrize(
    "url",
    [
        "s3://me:hidden@b/x",
        "https://ghp-hidden@h/x",
        "https://h/x?X-Amz-Signature=hidden",
        "s3://b/AKIAABCDEFGHIJKLMNOP",
        "s3://b/hidden-word",
    ],
)
def test_a_word_that_holds_a_secret_is_refused_and_not_repeated(capsys, monkeypatch, url):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hidden-word")
    line = error_of(capsys, 2, *RUN[:4], "--data.shards", url, *NOWHERE)
    assert "argument 6 after `submit` holds" in line and "hidden" not in line and "AKIA" not in line


def test_a_password_in_the_tracking_uri_is_refused_and_not_repeated(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hidden@mlflow")
    line = error_of(capsys, 2, *RUN, *NOWHERE)
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in line and "hidden" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("MLFLOW_TRACKING_URI", "sqlite:////x.db"), ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")],
)
def test_what_only_this_machine_reaches_is_refused_for_another(monkeypatch, name, value):
    for of_this_session in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(of_this_session, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(
        UsageError, match=f"{name} is {value}, which the nodes of http://head:8265 cannot reach"
    ):
        job_spec("http://head:8265", "r", ["run"], CHECKOUT)


def test_a_recipe_that_does_not_fit_its_data_ends_here(bucket):
    shards = write_shards(bucket, [8])
    with pytest.raises(ConfigError, match="global_batch_size"):
        check_here(parse_request([*RUN[:4], "--data.shards", shards]))


def test_shards_that_are_not_there_end_it_here(bucket):
    with pytest.raises(ShardError):
        check_here(parse_request([*RUN[:4], "--data.shards", bucket]))


@pytest.mark.parametrize("folder", ["/nodes/share/this", "file:///nodes/share/this"])
def test_a_folder_that_only_the_nodes_have_is_said_to_be_unchecked(capsys, folder):
    check_here(parse_request([*RUN[:4], "--data.shards", folder]))
    shown = capsys.readouterr().out
    assert shown.startswith("unchecked ") and shown.endswith(
        f"{folder}: no such folder on this machine\n"
    )


@pytest.mark.parametrize("verb", ["pretrain", "preflight"])
def test_a_verb_is_checked_for_what_it_does(bucket, capsys, verb):
    shards = write_shards(bucket, [128])  # no split `test`, which the demo's transfers would need
    check_here(
        parse_request(
            [verb, *RUN[1:4], "--data.shards", shards, "--pretrain.knn_every_epochs", "0"]
        )
    )
    assert capsys.readouterr().out == ""


def test_a_preflight_is_no_job_of_the_run_that_it_is_for():
    request = parse_request(["preflight", *RUN[1:], "--run", "first"])
    assert request.run.startswith("preflight-") and request.argv == [
        "preflight",
        *RUN[1:],
        "--run",
        "first",
    ]


def test_to_go_on_is_never_to_begin_anew():
    argv = ["run", "demo", "--fresh", "--run", "r"]
    assert resuming_argv(argv) == ["run", "demo", "--run", "r"]


def a_job(command: str) -> Job:
    return Job(
        id="r-1",
        run="r",
        status="RUNNING",
        command=command,
        commit="",
        message="",
        exit_status=None,
        started=0.0,
    )


@pytest.mark.parametrize("running", ["run demo", "run demo --fresh"])
@pytest.mark.parametrize("words", [("run", "demo"), ("run", "demo", "--fresh")])
def test_a_running_job_is_joined_with_fresh_and_without(running, words):
    job = a_job(running)
    assert _joined(job, JobSpec(NOWHERE[1], "r", words, CHECKOUT, {})) is job


def test_who_says_fresh_and_joins_is_told_that_nothing_begins_anew(capsys):
    job = a_job("run demo --fresh")
    _announce(job, False, NOWHERE[1], Request("r", ["run", "demo", "--fresh"], None, None))
    assert (
        f"has no effect on a running job; first run {_stop_command(job, NOWHERE[1])}"
        in capsys.readouterr().out
    )


def test_a_running_job_is_not_joined_with_other_words():
    with pytest.raises(
        UsageError, match=r"job r-1 works on run 'r' with another command \(run demo --fresh\)"
    ):
        _joined(
            a_job("run demo --fresh"),
            JobSpec(NOWHERE[1], "r", ("run", "other", "--fresh"), CHECKOUT, {}),
        )


def test_without_an_address_it_says_what_to_give(capsys):
    assert "--address http://head:8265" in error_of(capsys, 2, *RUN)


def test_a_dashboard_in_ray_address_is_the_default(capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE[1])
    assert f"{NOWHERE[1]} does not answer" in error_of(capsys, 1, *RUN)


def test_a_verb_that_runs_here_says_what_to_do_with_a_dashboard(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE[1])
    with (
        pytest.raises(UsageError, match="write `python -m jobs submit` before the verb"),
        local_ray(),
    ):
        pass


def test_another_server_is_not_taken_for_a_dashboard(capsys, s3):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    assert "is not the dashboard of a Ray cluster" in error_of(
        capsys, 1, *RUN, "--address", endpoint
    )


def test_the_run_has_the_name_that_it_has_here():
    words = [*RUN[1:], "--pretrain.epochs", "7"]
    name = parse_request(["pretrain", *words]).run
    assert name.startswith("demo-")
    assert parse_request(["run", *words]).run == name != parse_request(["run", *words[:-2]]).run


def test_a_recipe_file_is_sent_by_its_path_in_the_checkout(monkeypatch):
    monkeypatch.chdir(CHECKOUT / "jobs")
    request = parse_request(["run", "recipes/demo.py", *RUN[2:], "--run", "r"])
    assert request.argv == ["run", "jobs/recipes/demo.py", *RUN[2:], "--run", "r"]


def test_settings_become_the_words_that_set_them():
    words = [
        "demo",
        "--pretrain.epochs",
        "7",
        "--transfers.knn.inits",
        "random",
        "pretrained",
        "--pretrain.compile",
    ]
    changed = parse_options("run", words, RunOptions).recipe
    found = settings_flags(changed_settings(flat_params(changed), load_recipe("demo")))
    assert parse_options("run", ["demo", *found], RunOptions).recipe == changed


@pytest.mark.parametrize("verb", ["run", "pretrain"])
def test_the_words_that_resume_are_of_the_verb_that_began(tracking, capsys, verb):
    tags = {
        "hemoco.run": f"my-{verb}",
        "hemoco.phase": "parent",
        "hemoco.recipe": "demo",
        "hemoco.verb": verb,
    }
    params = flat_params(load_recipe("demo"))
    open_run(tracking, connect(tracking), name="r", parent=None, tags=tags, params=params)
    assert main(["status", f"my-{verb}"]) == 0
    assert f"resume      python -m jobs {verb} demo --run my-{verb}" in capsys.readouterr().out


def test_a_recipe_given_by_its_path_is_resumed_by_it(tracking, capsys, tmp_path):
    words = [
        str(tmp_path / "mine.py"),
        "--data.shards",
        "s3://b/x",
        "--pretrain.epochs",
        "7",
        "--run",
        "by-path",
    ]
    (tmp_path / "mine.py").write_text("from jobs.recipes.demo import recipe")
    tags = {"hemoco.run": "by-path", "hemoco.phase": "parent", "hemoco.recipe": "mine"}
    tags |= command_tags("run", words[0], parse_options("run", words, RunOptions))
    (tmp_path / "mine.py").write_text("raise SystemExit('status needs no recipe')")
    open_run(tracking, connect(tracking), name="r", parent=None, tags=tags, params={})
    assert main(["status", "by-path"]) == 0
    again = (
        f"python -m jobs run {tmp_path}/mine.py "
        "--data.shards s3://b/x --pretrain.epochs 7 --run by-path"
    )
    assert f"resume      {again}" in capsys.readouterr().out


def test_transfers_are_resumed_with_their_backbone_and_those_that_were_named(tracking, capsys):
    words = [
        "demo",
        "--data.shards",
        "s3://b/x",
        "--backbone",
        "s3://b/it's",
        "--only",
        "knn",
        "--run",
        "measured",
    ]
    tags = {"hemoco.run": "measured", "hemoco.phase": "parent", "hemoco.recipe": "demo"}
    tags |= command_tags("transfer", "demo", parse_options("transfer", words, TransferOptions)) | {
        "hemoco.backbone_url": "s3://b/it's"
    }
    open_run(tracking, connect(tracking), name="r", parent=None, tags=tags, params={})
    assert main(["status", "measured"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume ")]
    expected = ["transfer", "demo", *words[3:7], *words[1:3], *words[7:]]
    assert shlex.split(line)[1:] == ["python", "-m", "jobs", *expected]


@pytest.mark.parametrize(
    "command",
    [None, "", "no JSON", '{"recipe": "x.py"}', '{"recipe": "x", "settings": 1, "only": []}'],
)
@pytest.mark.parametrize("how", ["hemoco.recipe_file", "hemoco.recipe"])
def test_status_of_a_run_executes_no_file_that_a_tag_names(
    tracking, capsys, tmp_path, how, command
):
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    )
    evil = str(tmp_path / "evil.py")
    if how == "hemoco.recipe":
        evil = os.path.relpath(tmp_path / "evil", Path(jobs.options.__file__).parent / "recipes")
    run = f"evil-{os.urandom(4).hex()}"
    tags = {
        "hemoco.run": run,
        "hemoco.phase": "parent",
        "hemoco.recipe": "demo",
        "hemoco.verb": "run",
        how: evil,
    }
    tags |= {} if command is None else {"hemoco.command": command}
    open_run(tracking, connect(tracking), name="r", parent=None, tags=tags, params={})
    assert main(["status", run]) == 0
    assert f"resume      the command that began it, with --run {run}\n" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()
    with pytest.raises(
        UsageError, match="must define `recipe"
    ):  # the file is one that would have run
        load_recipe(str(tmp_path / "evil.py"))
    assert (tmp_path / "ran").exists()


def test_transfers_that_were_interrupted_have_not_failed(tracking, capsys):
    tags = {"hemoco.run": "ctrl-c", "hemoco.phase": "parent", "hemoco.recipe": "demo"}
    parent = open_run(tracking, connect(tracking), name="r", parent=None, tags=tags, params={})
    for name, status in (("knn", "FINISHED"), ("probe", "KILLED"), ("few", "FAILED")):
        close_run(
            tracking,
            open_run(tracking, connect(tracking), name=name, parent=parent, tags={}, params={}),
            status,
        )
    assert main(["status"]) == 0
    assert "transfers, 1 of 3 done, 1 failed, 1 interrupted" in capsys.readouterr().out


def test_a_demo_is_not_resumed(tracking, capsys):
    tags = {
        "hemoco.run": "d",
        "hemoco.phase": "parent",
        "hemoco.recipe": "demo",
        "hemoco.verb": "demo",
    }
    open_run(tracking, connect(tracking), name="d", parent=None, tags=tags, params={})
    assert main(["status", "d"]) == 0
    assert "resume      not possible" in capsys.readouterr().out


def test_the_newest_complete_checkpoint_is_told_by_names_alone(bucket):
    for name in (
        "step_00000009_a0/manifest.json",
        "step_00000009_a10/manifest.json",
        "step_00000012_a0/state.pt",
    ):
        write_bytes(join_url(bucket, name), b"")
    assert run_status.newest_complete(bucket) == join_url(bucket, "step_00000009_a10")
    assert run_status.newest_complete(join_url(bucket, "none")) is None


def test_checkpoints_have_the_names_that_are_looked_for():
    found = (checkpoint._FOLDER.pattern, checkpoint._MANIFEST)
    assert (run_status._CHECKPOINT.pattern, run_status._MANIFEST) == found
