"""The part of a checkout that is uploaded to a cluster, and the commit that is recorded."""

import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from cluster.submit.checkout import CHECKOUT, EXCLUDES, git_facts, upload_problems, uploaded_files
from cluster.submit.environment import job_spec


@pytest.fixture(autouse=True)
def no_facts_from_outside(monkeypatch):
    # a job is refused where these name a server of this machine
    servers = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI")
    for name in (
        *servers,
        "HEMOCO_GIT_COMMIT",
        "HEMOCO_GIT_DIRTY",
        "RAY_RUNTIME_ENV_IGNORE_GITIGNORE",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout: two modules, a recipe, what git and editors leave, a secret."""
    for name in (
        "hemoco/data/a.py",
        "jobs/recipes/mine.py",
        ".git/config",
        ".venv/x.py",
        ".env",
        "jobs/__pycache__/b",
    ):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text("x = 1\n")
    return tmp_path / "c"


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(
        ["git", "-C", folder, *identity, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_only_what_runs_is_uploaded(checkout):
    assert set(uploaded_files(checkout)) == {"hemoco/data/a.py", "jobs/recipes/mine.py"}


def test_the_upload_is_what_ray_packs(checkout, tmp_path):
    from ray._private.runtime_env.packaging import create_package

    (checkout / "hemoco" / ".gitignore").write_text("a.py\n")
    (checkout / ".rayignore").write_text("big\n")
    (checkout / "big").write_bytes(b"1" * 9)
    create_package(
        str(checkout), tmp_path / "p.zip", include_gitignore=True, excludes=list(EXCLUDES)
    )
    with ZipFile(tmp_path / "p.zip") as package:
        packed = {
            entry.filename: entry.file_size for entry in package.infolist() if not entry.is_dir()
        }
    assert uploaded_files(checkout) == packed


def test_this_checkout_can_be_uploaded():
    assert upload_problems(CHECKOUT, CHECKOUT / "jobs" / "recipes" / "demo.py") == []


def test_a_recipe_outside_the_checkout_is_told(checkout, tmp_path):
    (tmp_path / "mine.py").touch()
    assert (
        "mine.py: lies outside the checkout" in upload_problems(checkout, tmp_path / "mine.py")[0]
    )


@pytest.mark.parametrize("file", [".gitignore", ".rayignore", "jobs/.rayignore"])
def test_a_recipe_that_is_ignored_is_told(checkout, file):
    (checkout / file).write_text("mine.py\n")
    problems = upload_problems(checkout, checkout / "jobs" / "recipes" / "mine.py")
    assert "mine.py: would not be uploaded" in problems[0]


def test_a_module_that_is_ignored_is_told(checkout):
    (checkout / ".gitignore").write_text("data/\n")  # meant for a data set, hits hemoco/data
    assert upload_problems(checkout, None) == [
        "hemoco/data/a.py would not be uploaded: a .gitignore or .rayignore of the checkout names "
        "it; correct that file"
    ]


def test_an_upload_that_is_too_large_names_the_largest_files(checkout):
    with (checkout / "features.bin").open("wb") as file:
        file.truncate(70_000_000)
    (problem,) = upload_problems(checkout, None)
    assert (
        "3 files with 70.0 MB would be uploaded" in problem
        and "the largest: features.bin (70.0 MB)" in problem
    )


def test_git_tells_the_commit(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert git_facts(repository) == {
        "mlflow.source.git.commit": commit,
        "hemoco.git_dirty": "false",
    }


@pytest.mark.parametrize("name", ["a.py", "new.py"])
def test_a_changed_or_a_new_file_makes_it_dirty(repository, name):
    (repository / name).write_text("x = 2\n")
    assert git_facts(repository)["hemoco.git_dirty"] == "true"


def test_variables_tell_where_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("HEMOCO_GIT_COMMIT", "abc")
    monkeypatch.setenv("HEMOCO_GIT_DIRTY", "true")
    assert git_facts(tmp_path) == {"mlflow.source.git.commit": "abc", "hemoco.git_dirty": "true"}


def test_git_is_believed_before_variables(repository, monkeypatch):
    monkeypatch.setenv("HEMOCO_GIT_COMMIT", "an-older-one")
    monkeypatch.setenv("HEMOCO_GIT_DIRTY", "true")
    commit = git(repository, "rev-parse", "HEAD")
    assert git_facts(repository) == {
        "mlflow.source.git.commit": commit,
        "hemoco.git_dirty": "false",
    }


@pytest.mark.parametrize("dirty", ["", "yes"])
def test_what_no_variable_says_is_not_taken_for_clean(tmp_path, monkeypatch, dirty):
    monkeypatch.setenv("HEMOCO_GIT_COMMIT", "abc")
    monkeypatch.setenv("HEMOCO_GIT_DIRTY", dirty)
    assert git_facts(tmp_path)["hemoco.git_dirty"] == "unknown"
    assert job_spec("http://head:8265", "r", ["run"], tmp_path).commit == "abc-dirty"


def test_variables_tell_of_an_export_in_another_repository(repository, monkeypatch):
    (repository / "copy").mkdir()
    monkeypatch.setenv("HEMOCO_GIT_COMMIT", "abc")
    assert git_facts(repository / "copy")["mlflow.source.git.commit"] == "abc"


def test_a_folder_in_another_repository_has_no_commit(repository):
    (repository / "copy").mkdir()
    assert git_facts(repository / "copy") == {}


def test_without_git_there_are_no_facts(tmp_path, monkeypatch):
    assert shutil.which("git")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_facts(tmp_path) == {}
