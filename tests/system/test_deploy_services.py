"""The install lines of the image in a clean environment, and the services of compose.yaml."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.deploy_files import DOCKERFILE, ROOT

IMPORTS = (
    "ray, ray.train, torch, torchvision, mlflow, timm, webdataset, s3fs, tyro, psycopg, boto3, "
    "flask_wtf"
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment from the pip lines of the Dockerfile, beside the folders that it copies."""
    folder = tmp_path_factory.mktemp("image")
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", DOCKERFILE, re.M):
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, folder / target)
    subprocess.run([sys.executable, "-m", "virtualenv", "-q", folder / "venv"], check=True)
    environment = os.environ | {
        "VIRTUAL_ENV": str(folder / "venv"),
        "PATH": f"{folder / 'venv/bin'}:{os.environ['PATH']}",
    }
    lines = re.findall(r"^RUN ((?:uv )?pip install (?:.*\\\n)*.*)$", DOCKERFILE, re.M)
    assert len(lines) == 2
    for line in lines:
        subprocess.run(["bash", "-ec", line], cwd=folder, env=environment, check=True)
    yield folder
    shutil.rmtree(folder)


def run_in(image: Path, *words: str) -> str:
    """The output of the image's Python."""
    command = [image / "venv/bin/python", *words]
    return subprocess.run(command, cwd=image, check=True, capture_output=True, text=True).stdout


def test_the_image_has_what_every_role_imports(image):
    run_in(image, "-c", f"import {IMPORTS}")


def test_the_image_has_the_versions_that_the_project_names(image):
    script = (
        "import importlib.metadata as m; "
        "print('\\n'.join(f'{d.name}=={d.version}' for d in m.distributions()))"
    )
    installed = {line.lower().replace("_", "-") for line in run_in(image, "-c", script).split()}
    pins = re.findall(r'^    "([\w.-]+)==([^ ";]+)', (ROOT / "pyproject.toml").read_text(), re.M)
    wanted = {
        name: {f"{name}=={version}" for other, version in pins if other == name} for name, _ in pins
    }
    names = {line.partition("==")[0] for line in installed}
    assert {"ray", "torch", "mlflow"} <= wanted.keys() & names
    assert [name for name in wanted.keys() & names if not wanted[name] & installed] == []


def test_the_code_in_the_image_runs(image):
    assert "imagenet_resnet50_mocov2" in run_in(image, "-m", "jobs", "recipes")


@pytest.fixture(scope="module")
def services(image: Path) -> dict[str, Any]:
    """The answers of the services of compose.yaml, once all are healthy."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.fail("PostgreSQL is missing: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="hemoco-compose-"))
    folder.chmod(0o755)  # postgres is another user
    alone = ["unshare", *["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]]
    script = [
        sys.executable,
        "-m",
        "tests.helpers.compose_services",
        folder,
        image / "venv",
        found[-1],
    ]
    done = subprocess.run([*alone, *script], cwd=ROOT, capture_output=True, text=True)
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_neither_mlflow_nor_ray_serves_who_has_no_secret(services):
    assert services["mlflow without a password"] == services["ray without a token"] == 401


def test_mlflow_keeps_metrics_in_postgresql_and_artifacts_in_s3(services):
    assert services["mlflow"].splitlines()[-1] == "0.5 ['hello.txt']"
    assert services["artifacts"] == ["hello.txt"]


def test_the_head_runs_a_job(services):
    assert "imagenet_resnet50_mocov2" in services["job"] and "succeeded" in services["job"]
