"""The rules of docs/architecture.md: the order of imports, the doors, and the size of folders."""

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
"""The files or folders that may import an outside package."""
MAX_MODULES = 12
CATALOGUES = ("jobs/verbs", "jobs/recipes")
"""Folders with one file for each of many equal things, which may have more modules."""


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    others = ROOMS.keys() - ROOMS[room]
    imports = imports_of(room)
    assert not [str(line) for line in imports if line.module.partition(".")[0] in others]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_are_absolute_and_never_of_tests(room):
    imports = imports_of(room)
    assert not [str(line) for line in imports if line.module.partition(".")[0] in ("", "tests")]


def test_every_package_of_hemoco_is_in_the_order():
    folders = [path.parent for path in (ROOT / "hemoco").glob("*/__init__.py")]
    assert {f"hemoco.{folder.name}" for folder in folders} == set(ORDER[1:])


def test_a_package_of_hemoco_imports_only_what_comes_before_it():
    upward = []
    for line in imports_of("hemoco"):
        importer = package_of(line.file.removesuffix(".py").replace("/", "."))
        if line.file == "hemoco/__init__.py" or not is_inside(line.module, "hemoco"):
            continue  # hemoco/__init__.py imports load_backbone on first use
        if ORDER.index(package_of(line.module)) > ORDER.index(importer):
            upward.append(str(line))
    assert not upward


@pytest.mark.parametrize("package", DOORS)
def test_an_outside_package_has_one_door(package):
    lines = [line for room in ROOMS for line in imports_of(room) if is_inside(line.module, package)]
    assert lines, f"nothing imports {package}: has its door moved?"
    assert not [str(line) for line in lines if not line.file.startswith(DOORS[package])]


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
                # a filter expression of MLflow
                if "tags.`hemoco." in text_of(node):
                    wrong.append(f"{file}:{node.lineno}")
                # a key, a subscript or an argument
                if isinstance(node, ast.Subscript | ast.Dict | ast.Call):
                    children = ast.iter_child_nodes(node)
                    if any(text_of(child).startswith("hemoco.") for child in children):
                        wrong.append(f"{file}:{node.lineno}")
    assert not wrong


def text_of(node: ast.AST) -> str:
    """The value of a string literal, else an empty string."""
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if is_text else ""


def test_no_folder_is_crowded():
    crowded = {}
    for room in ROOMS:
        for folder in (ROOT / room, *(path for path in (ROOT / room).rglob("*") if path.is_dir())):
            name = folder.relative_to(ROOT).as_posix()
            files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            if len(files) > MAX_MODULES and name not in CATALOGUES:
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
