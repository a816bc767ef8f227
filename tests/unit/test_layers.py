"""Who may import what: the four rooms, and one door for each outside package."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {
    "hemoco": {"hemoco"},
    "pipeline": {"hemoco", "pipeline"},
    "cluster": {"hemoco", "cluster"},
    "jobs": {"hemoco", "pipeline", "cluster", "jobs"},
}
DOORS = {
    "ray": ("pipeline/", "cluster/"),
    "mlflow": ("hemoco/tracking/runs.py", "hemoco/tracking/models.py"),
    "webdataset": ("hemoco/data/",),
    "timm": ("hemoco/models/resnet.py",),
    "tyro": ("jobs/",),
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file names, absolute, with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno


def modules(room: str) -> Iterator[tuple[str, str, int]]:
    """Every import of a room: file, top-level package, line."""
    for path in sorted((ROOT / room).rglob("*.py")):
        for name, line in imports(path):
            yield path.relative_to(ROOT).as_posix(), name.partition(".")[0], line


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    wrong = [f"{f}:{line} {name}" for f, name, line in modules(room) if name in ROOMS.keys() - ROOMS[room]]
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_imports_are_absolute_and_never_of_tests(room):
    assert not [f"{f}:{line}" for f, name, line in modules(room) if name in ("", "tests")]


@pytest.mark.parametrize("package", DOORS)
def test_an_outside_package_has_one_door(package):
    found = [(f, line) for room in ROOMS for f, name, line in modules(room) if name == package]
    assert found, f"nothing imports {package}: has its door moved?"
    assert not [f"{f}:{line}" for f, line in found if not f.startswith(DOORS[package])]


def test_import_hemoco_is_light():
    heavy = ("ray", "mlflow", "webdataset", "s3fs", "torch")
    script = f"import sys, hemoco; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_backbone_loads_where_only_torch_torchvision_and_timm_are_installed():
    missing = ("ray", "mlflow", "webdataset", "s3fs", "aiobotocore", "botocore", "sklearn", "faster_coco_eval", "tyro")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); import hemoco; from hemoco.encoder import Backbone;"
        "hemoco.load_backbone"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
