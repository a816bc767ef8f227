"""One S3 server, one Ray and one MLflow store for a test session, started when first needed."""

import uuid
from collections.abc import Iterator

import pytest

from cluster.local.ray import local_ray
from cluster.local.servers import BUCKET, s3_environment, s3_server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a bucket on a running S3 server, which the environment names."""
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
    """Address of a running Ray with at least 2 logical cores, whose workers know the S3 server."""
    with local_ray() as address:
        yield address


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an MLflow store with its schema, which the environment names."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    MlflowClient(uri).search_experiments(max_results=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri
