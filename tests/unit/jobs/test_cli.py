"""The command line: exit status, and one line that names the error and what to do."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hemoco import config
from hemoco.config import Recipe, config_digest
from hemoco.errors import UsageError
from hemoco.version import __version__
from jobs.cli import _VERBS, main
from jobs.options import (
    RunOptions,
    TransferOptions,
    load_recipe,
    parse_options,
    recipe_names,
    typed_options,
)
from pipeline.checks import check_urls
from tests.helpers.shard_folders import write_shards

ROOT = Path(__file__).parents[3]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_says_its_command(name):
    assert isinstance(load_recipe(name), Recipe)
    assert "python -m jobs" in (ROOT / "jobs" / "recipes" / f"{name}.py").read_text()


def test_unknown_verb_is_wrong_usage_with_a_suggestion(capsys):
    assert main(["pretran"]) == 2
    assert "did you mean pretrain" in one_line(capsys)


def test_unknown_recipe_is_wrong_usage_with_a_suggestion(capsys):
    assert main(["run", "cifar10_resnet18_moco2"]) == 2
    assert "did you mean cifar10_resnet18_mocov2?" in one_line(capsys)


def test_recipe_file_without_a_recipe_is_wrong_usage(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("x = 1\n")
    assert main(["run", str(tmp_path / "mine.py")]) == 2
    assert "must define `recipe" in one_line(capsys)


def test_recipe_file_that_raises_is_named_with_the_reason(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("1 / 0\n")
    assert main(["run", str(tmp_path / "mine.py")]) == 2
    assert f"{tmp_path}/mine.py: ZeroDivisionError: division by zero" in one_line(capsys)


def test_recipe_file_that_is_not_there_is_no_misspelt_name(tmp_path, capsys):
    assert main(["run", str(tmp_path / "mine.py")]) == 2
    assert "mine.py: no such file" in one_line(capsys)


CLASSES = [name for name in config.__all__ if dataclasses.is_dataclass(getattr(config, name))]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_recipes_shows_its_settings(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main(["recipes", name])
    said = capsys.readouterr().out
    shown = {word.partition(".")[0] for word in re.findall(r"--(?:no_)?([a-z_0-9.]+)", said)}
    others = {
        "space",
        "sweep",
        "transfers",
    }  # explained by classes of their own, or not set by flags
    assert {field.name for field in dataclasses.fields(getattr(config, name))} - shown <= others


def test_a_class_of_recipes_says_what_its_settings_mean(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["recipes", "KnnConfig"])
    assert "a neighbour's vote has the weight" in capsys.readouterr().out


def test_unknown_class_is_wrong_usage_with_a_suggestion(capsys):
    assert main(["recipes", "KnnConfg"]) == 2
    assert "did you mean KnnConfig?" in one_line(capsys)


def test_misspelt_flag_gets_a_suggestion():
    done = run("run", "cifar10_resnet18_mocov2", "--pretrain.optimiser.lr", "0.1")
    assert done.returncode == 2
    assert "--pretrain.optimizer.lr" in done.stdout + done.stderr


def test_setting_out_of_range_is_wrong_usage(capsys):
    assert main(["run", "cifar10_resnet18_mocov2", "--pretrain.moco.temperature", "-1"]) == 2
    assert "moco.temperature is -1.0: it must be positive" in one_line(capsys)


def test_missing_shards_say_what_to_name(tmp_path):
    done = run(
        "run", "cifar10_resnet18_mocov2", "--storage", str(tmp_path)
    )  # another process: this one may have a Ray
    assert done.returncode == 2
    assert "error: --data.shards is missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_transfer_without_backbone_is_wrong_usage(capsys):
    assert main(["transfer", "cifar10_resnet18_mocov2"]) == 2
    assert "--backbone" in one_line(capsys)


def test_only_names_a_transfer_of_the_recipe(capsys):
    words = ["transfer", "cifar10_resnet18_mocov2", "--backbone", "x", "--only", "detection"]
    assert main(words) == 2
    assert "it has knn, linear_probe, low_shot" in one_line(capsys)


def test_unreachable_mlflow_is_one_line_within_seconds(tmp_path):
    done = run(
        "pretrain",
        "cifar10_resnet18_mocov2",
        "--data.shards",
        write_shards((tmp_path / "shards").as_uri(), [128]),
        "--pretrain.global_batch_size",
        "128",
        "--pretrain.knn_every_epochs",
        "0",
        "--storage",
        str(tmp_path / "runs"),
        MLFLOW_TRACKING_URI="http://127.0.0.1:9",
    )
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_folder_without_shards_is_one_line(tmp_path, capsys):
    assert main(["pretrain", "cifar10_resnet18_mocov2", "--data.shards", str(tmp_path)]) == 1
    assert "python -m jobs pack SOURCE DEST" in one_line(capsys)


def test_help_of_a_recipe_verb_needs_no_recipe(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert ended.value.code == 0
    assert "cifar10_resnet18_mocov2" in capsys.readouterr().out


def test_flags_are_the_names_of_the_config():
    options = parse_options(
        "run", ["cifar10_resnet18_mocov2", "--transfers.knn.neighbours", "7"], RunOptions
    )
    assert options.recipe.transfers["knn"].neighbours == 7


def test_paths_become_urls_and_the_default_name_is_that_of_what_was_typed(tmp_path, monkeypatch):
    words = [
        "demo",
        "--data.shards",
        "some/folder",
        "--storage",
        "runs",
        "--transfers.knn.inits",
        "pretrained",
        "a=x",
    ]
    words += ["--backbone", "backbone.safetensors"]
    found = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        options = parse_options("transfer", words, TransferOptions)
        here = folder.as_uri()
        assert (options.storage, options.backbone) == (
            f"{here}/runs",
            f"{here}/backbone.safetensors",
        )
        assert options.recipe.data.shards == f"{here}/some/folder"
        assert options.recipe.transfers["knn"].inits == ("pretrained", f"a={here}/x")
        found.append(options.run)
    typed = typed_options("transfer", words, TransferOptions)
    assert (typed.recipe.data.shards, typed.run) == ("some/folder", "")
    digest = config_digest({"recipe": typed.recipe, "more": ("backbone.safetensors",)})
    assert found == [f"demo-{digest}"] * 2


def test_urls_and_registered_backbones_stay_as_they_are():
    words = [
        "demo",
        "--data.shards",
        "s3://b/x",
        "--storage",
        "s3://b/runs",
        "--backbone",
        "models:/mine@best",
    ]
    options = parse_options("transfer", words, TransferOptions)
    assert (options.recipe.data.shards, options.storage) == ("s3://b/x", "s3://b/runs")
    assert options.backbone == "models:/mine@best"


def test_the_pipeline_refuses_paths_instead_of_urls():
    recipe = dataclasses.replace(load_recipe("demo"), data=config.DataConfig(shards="some/folder"))
    with pytest.raises(UsageError, match=r"data\.shards is some/folder: give a URL"):
        check_urls(recipe)


def test_help_of_the_command_and_of_a_verb():
    top, verb = run("--help"), run("pack", "--help")
    assert top.returncode == 0 and verb.returncode == 0
    assert "Does pretraining on my data transfer?" in top.stdout
    words = verb.stdout.replace("│", " ").split()
    assert {"class", "COCO", "Pascal", "VOC", "--index_only", "WebDataset"} <= set(words)


def test_help_is_also_a_verb(capsys):
    assert main(["help"]) == 0
    asked = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == asked
    assert main([]) == 2


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hemoco {__version__}\n"


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    try:
        main([*argv, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
    return capsys.readouterr().out.splitlines()


PAGES = [
    (),
    *((verb,) for verb in _VERBS),
    *(("backbones", action) for action in ("list", "alias", "delete")),
    *((verb, "cifar10_resnet18_sweep") for verb in ("run", "pretrain", "sweep", "preflight")),
    ("transfer", "transfer_coco"),
]


@pytest.mark.parametrize("argv", PAGES, ids=" ".join)
def test_no_line_of_a_help_page_is_longer_than_the_terminal(capsys, monkeypatch, argv):
    monkeypatch.setenv("COLUMNS", "100")
    # tyro does not wrap usage and recipe names
    lines = [line for line in help_of(capsys, *argv) if not line.startswith("usage:")]
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize(
    ("argv", "begins", "ends"),
    [
        (("compare",), "folder for the files;", "for one run also details.json and details.csv"),
        (("run", "demo"), "Folder for comparison.json,", "in $HEMOCO_HOME/reports."),
    ],
)
def test_help_texts_are_wrapped_by_the_terminal_only(capsys, monkeypatch, argv, begins, ends):
    monkeypatch.setenv("COLUMNS", "1000")
    (line,) = [line for line in help_of(capsys, *argv) if begins in line]
    assert ends in line
