"""Output of a finished run: files in a folder, and the results on its page in MLflow."""

import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.session import show_results
from tests.helpers.made_report import RECIPE, VALUES
from tests.helpers.made_runs import begin_run, write_transfer

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")


def test_results_are_on_the_page_of_the_run(
    tracking: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    run = begin_run(tracking, f"page-{uuid.uuid4().hex}", RECIPE)
    write_transfer(run, "knn", VALUES)
    show_results(run.name, str(tmp_path))
    client = MlflowClient(tracking)
    data = client.get_run(run.parent).data
    assert data.metrics == {
        "knn/top1/pretrained": 0.625,
        "knn/top1/random": 0.1875,
        "knn/top1/over_random": 0.4375,
    }
    assert "| knn | top1 | **0.625 ± 0.177 (2)** | 0.188" in data.tags["mlflow.note.content"]
    kept = {item.path for item in client.list_artifacts(run.parent)}
    assert kept == {"comparison.json", "comparison.csv", "comparison.md", "report.html"}
    assert {
        path.name for path in tmp_path.iterdir()
    } == kept and f"compare {run.name}" in capsys.readouterr().out
