"""The environment of all tests, and the data sets that they share."""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# before ray, mlflow or torch is imported
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# processes that tests start would compile torch and ray each time
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# neither the user's home nor a cluster or server of the user's may be touched
os.environ["HEMOCO_HOME"] = tempfile.mkdtemp(prefix="hemoco-tests-")
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("AWS_PROFILE", None)
os.environ.pop("AWS_SESSION_TOKEN", None)
sys.path.insert(0, str(Path(__file__).parents[1]))
# `nohup pytest &` starts with SIGINT ignored, and every process that a test starts and interrupts
# would inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.helpers.drawn_sets import write_polygon_coco, write_sparse_coco
from tests.helpers.servers import bucket, ray_cluster, s3, tracking

__all__ = [
    "bucket",
    "ray_cluster",
    "s3",
    "tracking",
]  # one of each for a session; tests/unit refuses them


TESTS = Path(__file__).parent


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns two workers for the folders of quick tests, and none for single files.

    The start of workers would delay a single file. Tests of tests/system stay in one process: they
    use fixed network names, and both cores.
    """
    folders = [Path(arg).resolve() for arg in config.args]
    quick = all(
        folder.is_dir() and folder.is_relative_to(TESTS) and folder not in (TESTS, TESTS / "system")
        for folder in folders
    )
    return 2 if quick and not config.option.keyword else 0


class ServicesBesideUnits(LoadScopeScheduling):  # type: ignore[misc]
    """Gives tests/services to one worker, since they share servers; files of tests/unit to any."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "tests/services" if file.startswith("tests/services/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ServicesBesideUnits:
    return ServicesBesideUnits(config, log)


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HEMOCO_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of small real data sets in the repository; its README has origins and licences."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def coco_sets(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in COCO's layout: nuclei in compressed RLE, sparse ids with crowds, polygons."""
    return {
        "dsb2018": test_data / "dsb2018",
        "sparse": write_sparse_coco(tmp_path_factory.mktemp("sets") / "sparse"),
        "polygons": write_polygon_coco(tmp_path_factory.mktemp("sets") / "polygons"),
    }
