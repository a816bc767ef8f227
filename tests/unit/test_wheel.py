"""The files that `pip install hemoco` installs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in the wheel, which is built without network access."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_holds_hemoco_alone(names):
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hemoco"}


def test_the_wheel_holds_every_module_of_hemoco_and_the_templates_of_the_report(names):
    files = [*(ROOT / "hemoco").rglob("*.py"), *(ROOT / "hemoco/report/templates").iterdir()]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(names)


def test_the_wheel_carries_its_types(names):
    assert "hemoco/py.typed" in names


def test_the_wheel_carries_the_licence(names):
    assert any(name.endswith("licenses/LICENSE") for name in names)
