"""Tests here use no server: the fixtures of tests/helpers/servers.py are not known, and Ray and MLflow out of reach."""

import sys
from collections.abc import Iterator

import pytest


def _ray_is_running() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that connects this process to Ray; nothing answers at the addresses that the environment names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    before = _ray_is_running()
    yield
    assert _ray_is_running() == before, "this test starts Ray: its place is tests/services"
