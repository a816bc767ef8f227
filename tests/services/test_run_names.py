"""Names of runs, and `--fresh`, which removes nothing but that run's folder."""

import os
from pathlib import Path

import pytest

from hemoco.config import DataConfig, KnnConfig, Recipe
from hemoco.data.shards.index import ShardIndexes
from hemoco.errors import ConfigError, UsageError
from hemoco.names import check_run_name, is_name
from hemoco.storage.objects import exists, join_url, list_names, write_bytes
from hemoco.tracking.client import connect
from hemoco.tracking.runs import find_run
from jobs.cli import main
from pipeline.open_run import open_study
from pipeline.run_folder import (
    MARK,
    check_run_folder,
    mark_run_folder,
    remove_run_folder,
    saved_names,
)
from tests.helpers.shard_folders import write_shards

WRONG = ["..", ".", "...", "a/b", "../a", "/tmp", "a b", "a\n", "ä", "$(id)", "a;b"]


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a folder of runs, on the local disk and in a bucket."""
    return tmp_path.as_uri() if request.param == "disk" else str(request.getfixturevalue("bucket"))


def run_written_before(url: str) -> None:
    """Writes what runs without a marker had: a pretraining, a transfer, a curve, a backbone."""
    for name in (
        "pretrain/checkpoints/step_00000010_a0/manifest.json",
        "pretrain/backbones/epoch_0001.safetensors",
        "pretrain/bad_samples/rank_0000.jsonl",
        "probe/pretrained_seed_0/checkpoints/step_00000010_a0/manifest.json",
        "curve_probe_epoch_0001/pretrained_seed_0/unsent_metrics/0123/1.jsonl",
        "curve/unsent_metrics/0123/1.jsonl",
        "backbone.safetensors",
    ):
        write_bytes(join_url(url, name), b"x")


@pytest.mark.parametrize("name", WRONG)
def test_a_name_that_leads_elsewhere_is_wrong_usage(name, capsys):
    for verb in ("run", "pretrain", "sweep", "preflight", "transfer"):
        assert (
            main([verb, "cifar10_resnet18_sweep", "--data.shards", "s", "--run", name, "--fresh"])
            == 2
        )
        assert f"--run is {name!r}: allowed are letters" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["status", "compare", "stop", "sync"])
def test_what_is_looked_up_is_a_run_or_a_trial(verb, capsys):
    assert main([verb, "../../etc"]) == 2
    assert "RUN is '../../etc'" in capsys.readouterr().err
    check_run_name("RUN", "lr-search/trial_0003")
    with pytest.raises(UsageError, match=r"or SWEEP/TRIAL"):
        check_run_name("RUN", "lr-search/..")


def test_a_name_has_letters_digits_dot_underscore_and_dash():
    assert all(map(is_name, ["a", "A.b_c-1", "..a", "-1", "a.."]))
    assert not any(map(is_name, [*WRONG, ""]))


def test_recipes_and_transfers_follow_the_rule_too():
    with pytest.raises(ConfigError, match=r"recipe.name is '../x'"):
        Recipe(name="../x")
    with pytest.raises(ConfigError, match=r"a transfer 'a/b'"):
        Recipe(name="x", transfers={"a/b": KnnConfig()})


def test_a_folder_with_the_mark_of_the_run_is_removed_whole(storage):
    url = join_url(storage, "mine")
    mark_run_folder(url, "mine")
    write_bytes(join_url(url, "of_a_later_version", "x"), b"x")
    write_bytes(join_url(storage, "other", "x"), b"x")
    remove_run_folder(url, "mine")
    assert list_names(url) == [] and list_names(storage) in (["other"], ["mine", "other"])


def test_a_run_begun_before_there_was_a_mark_is_removed_too(storage):
    url = join_url(storage, "old")
    run_written_before(url)
    remove_run_folder(url, "old")
    assert list_names(url) == []


def test_a_resumed_run_of_before_gets_its_mark_and_foreign_folders_get_none(storage):
    old, photos = join_url(storage, "old"), join_url(storage, "photos")
    run_written_before(old)
    write_bytes(join_url(photos, "cat", "1.jpg"), b"x")
    mark_run_folder(old, "old")
    mark_run_folder(photos, "photos")
    assert (
        MARK in list_names(old) and MARK not in saved_names(old) and list_names(photos) == ["cat"]
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cat/1.jpg", "has no hemoco-run.json, and cat in it is not what a run writes"),
        ("notes.txt", "notes.txt in it is not what a run writes"),
        ("pretrain/thesis.tex", "pretrain in it is not what a run writes"),
        ("trial_0000/pretrain/checkpoints/x", "trial_0000 in it is not what a run writes"),
    ],
)
def test_a_folder_of_other_things_stays_as_it_is(storage, name, reason):
    url = join_url(storage, "photos")
    run_written_before(url)
    write_bytes(join_url(url, name), b"mine")
    before = list_names(url)
    with pytest.raises(UsageError, match=reason) as refused:
        remove_run_folder(url, "photos")
    assert url in str(refused.value) and "choose another --run name" in str(refused.value)
    assert list_names(url) == before and exists(join_url(url, name))


def test_a_folder_marked_for_another_run_stays(storage):
    url = join_url(storage, "a")
    mark_run_folder(url, "b")
    with pytest.raises(UsageError, match="names run 'b'"):
        remove_run_folder(url, "a")
    write_bytes(join_url(url, MARK), b"{}")
    with pytest.raises(UsageError, match="names no run"):
        remove_run_folder(url, "a")


@pytest.mark.parametrize("inner", ["b/hemoco-run.json", "search/trial_0000/pretrain/stop"])
def test_a_run_that_holds_another_one_stays(storage, inner):
    url = join_url(storage, "a")
    mark_run_folder(url, "a")
    write_bytes(join_url(url, inner), b"{}")
    with pytest.raises(UsageError, match="in it is the folder of another run or sweep"):
        remove_run_folder(url, "a")


def test_home_working_folder_what_is_above_them_and_buckets_are_never_removed(
    tmp_path, monkeypatch, bucket
):
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    (tmp_path / "link").symlink_to(tmp_path / "work")
    for place in (
        work,
        work.parent,
        tmp_path / "link",
        tmp_path,
        Path.home(),
        Path(os.environ["HEMOCO_HOME"]),
        "/",
    ):
        with pytest.raises(UsageError, match="it is or contains"):
            check_run_folder(str(place), "a")
    with pytest.raises(UsageError, match="it is a whole bucket"):
        check_run_folder("s3://" + bucket.removeprefix("s3://").partition("/")[0], "a")


def test_fresh_begins_anew_in_its_own_folder_and_refuses_another(bucket, tracking, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    storage, run = join_url(bucket, "runs"), f"fresh-{os.urandom(4).hex()}"
    recipe = Recipe(name="r", data=DataConfig(shards=write_shards(join_url(bucket, "shards"), [8])))
    first = open_study(
        recipe, indexes=ShardIndexes(), run=run, storage=storage, fresh=False, tags={}
    )
    write_bytes(join_url(first.url, "pretrain", "checkpoints", "x"), b"x")
    second = open_study(
        recipe, indexes=ShardIndexes(), run=run, storage=storage, fresh=True, tags={}
    )
    assert list_names(second.url) == [MARK] and second.parent_id != first.parent_id
    elsewhere = join_url(bucket, "elsewhere")
    write_bytes(join_url(elsewhere, run, "thesis.tex"), b"x")
    for fresh, name in ((True, run), (True, ".."), (True, "../x")):
        with pytest.raises(UsageError):
            open_study(
                recipe, indexes=ShardIndexes(), run=name, storage=elsewhere, fresh=fresh, tags={}
            )
    known = find_run(tracking, connect(tracking), {"hemoco.run": run, "hemoco.phase": "parent"})
    assert (
        known is not None and known.run_id == second.parent_id
    )  # what is refused has not been forgotten
    assert list_names(join_url(elsewhere, run)) == ["thesis.tex"]
    assert exists(recipe.data.shards)


def test_without_fresh_another_folder_of_this_name_is_no_invitation_to_remove_it(
    bucket, tracking, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    recipe = Recipe(name="r", data=DataConfig(shards=write_shards(join_url(bucket, "shards"), [8])))
    run = f"photos-{os.urandom(4).hex()}"
    write_bytes(join_url(bucket, run, "cat", "1.jpg"), b"x")
    with pytest.raises(UsageError, match="cat in it is not what a run writes") as refused:
        open_study(recipe, indexes=ShardIndexes(), run=run, storage=bucket, fresh=False, tags={})
    assert "--fresh" not in str(refused.value)
    write_bytes(join_url(bucket, f"{run}-2", "pretrain", "checkpoints", "x"), b"x")
    with pytest.raises(UsageError, match="or --fresh to remove it"):
        open_study(
            recipe, indexes=ShardIndexes(), run=f"{run}-2", storage=bucket, fresh=False, tags={}
        )
