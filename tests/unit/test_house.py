"""The walls of the house: who may import what, one door for each outside package, no crowded folder."""

import ast
import subprocess
import sys

import pytest

from tests.helpers.draw_house import PICTURE, draw
from tests.helpers.house import ORDER, ROOMS, ROOT, imports_of, is_inside, package_of

DOORS = {
    "ray": ("pipeline/", "cluster/"),
    "mlflow": ("hemoco/tracking/",),
    "fsspec": ("hemoco/storage/",),
    "webdataset": ("hemoco/data/",),
    "timm": ("hemoco/models/resnet.py", "hemoco/backbones/inits.py"),
    "torchvision.models": ("hemoco/transfer/detection/",),
    "pyarrow": ("hemoco/features/", "pipeline/workers/group.py"),
    "matplotlib": ("hemoco/report/", "hemoco/transfer/classification/scores.py"),
    "jinja2": ("hemoco/report/",),
    "rich": ("jobs/", "hemoco/report/"),
    "tyro": ("jobs/",),
    "psutil": (
        "hemoco/errors.py",
        "hemoco/tracking/system_metrics.py",
        "cluster/local/processes.py",
    ),
    "pynvml": ("hemoco/tracking/system_metrics.py",),
}
"""Where an outside package may be imported."""
FULLEST = 12
CATALOGUES = ("jobs/verbs", "jobs/recipes")
"""Folders with one file for each of many equal things, in which nobody gets lost."""


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    others = ROOMS.keys() - ROOMS[room]
    assert not [
        str(found) for found in imports_of(room) if found.module.partition(".")[0] in others
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_are_absolute_and_never_of_tests(room):
    assert not [
        str(found) for found in imports_of(room) if found.module.partition(".")[0] in ("", "tests")
    ]


def test_every_package_of_hemoco_has_its_place_in_the_order():
    packages = {
        f"hemoco.{path.name}"
        for path in (ROOT / "hemoco").iterdir()
        if (path / "__init__.py").is_file()
    }
    assert packages == set(ORDER[1:])


def test_a_package_of_hemoco_imports_only_what_stands_before_it():
    upward = []
    for found in imports_of("hemoco"):
        importer = package_of(found.file.removesuffix(".py").replace("/", "."))
        if found.file == "hemoco/__init__.py" or not is_inside(found.module, "hemoco"):
            continue  # the front door reaches into the rooms, when it is asked for something
        if ORDER.index(package_of(found.module)) > ORDER.index(importer):
            upward.append(str(found))
    assert not upward


@pytest.mark.parametrize("package", DOORS)
def test_an_outside_package_has_one_door(package):
    found = [each for room in ROOMS for each in imports_of(room) if is_inside(each.module, package)]
    assert found, f"nothing imports {package}: has its door moved?"
    assert not [str(each) for each in found if not each.file.startswith(DOORS[package])]


def test_tags_are_spelt_out_in_one_module_only():
    wrong = []
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            file = path.relative_to(ROOT).as_posix()
            if file in (
                "hemoco/tracking/tags.py",
                "hemoco/features/parquet.py",
                "hemoco/features/cache.py",
            ):
                continue  # the last two write files with metadata of their own
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and "tags.`hemoco." in node.value
                ):
                    wrong.append(f"{file}:{node.lineno}")
                if isinstance(node, ast.Subscript | ast.Dict | ast.Call):
                    strings = [
                        part
                        for part in ast.iter_child_nodes(node)
                        if isinstance(part, ast.Constant)
                    ]
                    texts = [part.value for part in strings if isinstance(part.value, str)]
                    wrong += [
                        f"{file}:{node.lineno}" for text in texts if text.startswith("hemoco.")
                    ]
    assert not wrong


def test_no_folder_is_crowded():
    crowded = {}
    for room in ROOMS:
        for folder in (ROOT / room, *(path for path in (ROOT / room).rglob("*") if path.is_dir())):
            name = folder.relative_to(ROOT).as_posix()
            files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            if len(files) > FULLEST and name not in CATALOGUES:
                crowded[name] = len(files)
    assert not crowded


def test_import_hemoco_is_light():
    heavy = ("ray", "mlflow", "webdataset", "s3fs", "torch")
    script = f"import sys, hemoco; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_backbone_loads_where_only_torch_torchvision_and_timm_are_installed():
    missing = (
        "ray",
        "mlflow",
        "webdataset",
        "s3fs",
        "aiobotocore",
        "botocore",
        "sklearn",
        "faster_coco_eval",
        "tyro",
        "psutil",
        "pynvml",
    )
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); import hemoco;"
        "from hemoco.models.resnet import Backbone; hemoco.load_backbone"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_picture_shows_the_imports_as_they_are():
    assert PICTURE.read_text() == draw(), "draw it anew: uv run python -m tests.helpers.draw_house"
