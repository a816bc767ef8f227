"""One S3 server, one Ray and one MLflow schema for the whole session; each is started when a test first asks."""

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

# before ray, mlflow or torch is imported
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# neither the user's home nor a cluster or server of the user's may be touched
os.environ["HEMOCO_HOME"] = tempfile.mkdtemp(prefix="hemoco-tests-")
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("AWS_PROFILE", None)
os.environ.pop("AWS_SESSION_TOKEN", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest

from cluster.local.ray import local_ray
from cluster.local.servers import BUCKET, s3_environment, s3_server
from tests.helpers.drawn_sets import write_polygon_coco, write_sparse_coco


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HEMOCO_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running S3 server that the environment names; the URL of its bucket."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(server).items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture
def bucket(s3: str) -> str:
    """A URL on the S3 server that no other test uses."""
    return f"{s3}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def ray_cluster(s3: str) -> Iterator[str]:
    """A running Ray with at least 2 logical cores whose workers know the S3 server; its address."""
    with local_ray() as address:
        yield address


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of an MLflow store with its schema made, named by the environment."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    MlflowClient(uri).search_experiments(max_results=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of small real data sets that the repository carries; its README has origins and licences."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def coco_sets(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in COCO's layout by name: nuclei in compressed RLE, sparse ids with crowds, polygons only."""
    return {
        "dsb2018": test_data / "dsb2018",
        "sparse": write_sparse_coco(tmp_path_factory.mktemp("sets") / "sparse"),
        "polygons": write_polygon_coco(tmp_path_factory.mktemp("sets") / "polygons"),
    }
