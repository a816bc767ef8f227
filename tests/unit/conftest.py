"""Keeps servers from unit tests.

Fixtures of tests/helpers/servers.py fail, and S3, Ray and MLflow are out of reach.
"""

import sys
from collections.abc import Iterator

import pytest


def _ray_is_running() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that connects to Ray, and names addresses where no S3 or MLflow answers."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    before = _ray_is_running()
    yield
    assert _ray_is_running() == before, "this test starts Ray: its place is tests/services"


@pytest.fixture(scope="session")
def s3() -> None:
    """Refuses the server to this test, and with it the fixtures bucket and ray_cluster."""
    pytest.fail("a test that needs a server has its place in tests/services")


@pytest.fixture(scope="session")
def tracking() -> None:
    """Refuses MLflow to this test."""
    pytest.fail("a test that needs MLflow has its place in tests/services")
