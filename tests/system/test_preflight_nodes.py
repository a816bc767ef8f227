"""`python -m jobs preflight` on a cluster, and TLS to a server that does not have it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hemoco.errors import StorageError
from hemoco.storage.objects import list_names
from tests.helpers.preflight_recipe import RECIPE
from tests.helpers.shard_folders import write_shards

ROOT = Path(__file__).parents[2]
NO_BOXES = "has no object categories"  # the error of the recipe's second transfer


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "tiny.py").write_text(RECIPE)
    return str(tmp_path / "tiny.py")


@pytest.fixture(scope="module")
def shards(s3: str) -> str:
    return write_shards(f"{s3}/preflight-shards", [40, 40])


def test_tls_where_there_is_none_is_named(s3, monkeypatch):
    monkeypatch.setenv(
        "AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"].replace("http:", "https:")
    )
    with pytest.raises(StorageError, match="does not speak TLS: correct AWS_ENDPOINT_URL"):
        list_names(s3)


def test_the_nodes_of_a_cluster_check_themselves(recipe, shards, bucket, tracking, ray_cluster):
    command = [sys.executable, "-m", "jobs", "preflight", recipe]
    command += ["--data.shards", shards, "--storage", bucket]
    environment = os.environ | {"RAY_ADDRESS": ray_cluster}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    ok = [line[6:22].strip() for line in done.stdout.splitlines() if line.startswith("ok")]
    nodes = [
        "software",
        "shards",
        "storage",
        "clock",
        "MLflow",
        "disk",
        "shm",
        "clock here",
        "results",
    ]
    assert [name for name in ok if name.startswith("nodes")] == [
        f"nodes {name}" for name in ["versions", *nodes]
    ], done.stdout
    assert "ok    Ray token        requests without the token are refused" in done.stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1 and NO_BOXES in failed[0]
    assert list_names(bucket) == []
