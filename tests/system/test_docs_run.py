"""docs/tutorial.md and docs/how-to/ as a reader types them, one after the other in one home."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.docs_pages import Block, blocks, console_commands, pages
from tests.helpers.docs_sandbox import Sandbox, run_page, stable_part
from tests.helpers.house import ROOMS, ROOT

TUTORIAL = "docs/tutorial.md"
HOW_TO = [page for page in pages() if page.startswith("docs/how-to/")]
EXPORT = "docs/how-to/export-a-backbone.md"
BESIDE = ("docs/how-to/add-a-transfer.md", "docs/how-to/run-on-your-own-machines.md", EXPORT)
"""Pages with a test of their own: below, and tests/system/test_own_machines.py."""
RUNNING = [
    page
    for page in HOW_TO
    if page not in BESIDE
    and any(block.runs and block.language in ("bash", "console") for block in blocks(page))
]
Shown = list[tuple[Block, str, list[str]]]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("docs") / "me")


@pytest.fixture(scope="module")
def tutorial(sandbox: Sandbox) -> Shown:
    """Every command of the tutorial with its output; its files stay in the sandbox."""
    return run_page(sandbox, blocks(TUTORIAL))


def assert_pages_show(seen: Shown) -> None:
    for block, command, output in seen:
        shown = dict(console_commands(block.text))[command]
        mend = "uv run python -m tests.helpers.write_tutorial" if block.page == TUTORIAL else ""
        printed = "\n".join(output)
        assert stable_part(shown) == stable_part(output), f"{block} is stale {mend}\n{printed}"


def test_the_tutorial_has_ten_commands_with_the_output_that_it_shows(tutorial: Shown) -> None:
    assert len(tutorial) == 10
    assert_pages_show(tutorial)


def test_the_answer_of_the_tutorial_is_that_pretraining_transfers(
    sandbox: Sandbox, tutorial: Shown
) -> None:
    rows = json.loads((sandbox.folder / "results" / "comparison.json").read_text())["rows"]
    values = {(row["transfer"], row["init"], row["seed"]): row["value"] for row in rows}
    for transfer in ("knn", "five_labels"):
        for seed in (0, 1, 2):
            assert values[transfer, "pretrained", seed] > values[transfer, "random", seed]


@pytest.mark.parametrize("page", RUNNING)
def test_blocks_of_a_page_run_after_the_tutorial(
    sandbox: Sandbox, tutorial: Shown, page: str
) -> None:
    assert_pages_show(run_page(sandbox, blocks(page)))


def test_python_that_loads_the_backbone_runs(sandbox: Sandbox, tutorial: Shown) -> None:
    assert_pages_show(run_page(sandbox, blocks(EXPORT)))
    readme = [block for block in blocks("README.md") if block.language == "python" and block.runs]
    python = [block for block in blocks(EXPORT) if block.language == "python" and block.runs]
    scripts = [block.text for block in (*python, readme[-1])]
    text = re.sub(
        r'"s3://bucket/runs/NAME/[^"]+"', '"models:/hemoco-mine@first"', "\n".join(scripts)
    )
    (sandbox.folder / "load.py").write_text(f"{text}\nprint(features.shape, model.num_features)")
    assert sandbox.run("python load.py").split()[-1] == "96"


def apply_diff(folder: Path, text: str) -> None:
    """Replaces the lines of a `diff` block, which must stand in the file once."""
    header, *lines = text.splitlines()
    file = folder / header.removeprefix("--- ")
    old = "\n".join(line[1:] for line in lines if line[:1] in (" ", "-", ""))
    new = "\n".join(line[1:] for line in lines if line[:1] in (" ", "+", ""))
    if not old:
        raise ValueError(f"{header}: a diff needs a line that says where it goes")
    assert file.read_text().count(f"{old}\n") == 1, f"{header}\n{old}"
    file.write_text(file.read_text().replace(f"{old}\n", f"{new}\n"))


def test_the_four_files_of_a_new_transfer_pass_their_test(tmp_path: Path) -> None:
    for room in (*ROOMS, "tests/helpers"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / room, tmp_path / room, ignore=ignored)
    for file in ("pyproject.toml", "tests/conftest.py", "tests/unit/conftest.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    touched = set()
    for block in blocks("docs/how-to/add-a-transfer.md"):
        if block.language == "diff":
            apply_diff(tmp_path, block.text)
            touched.add(block.text.splitlines()[0].removeprefix("--- "))
        elif block.file:
            path = tmp_path / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n")
            touched.add(block.file)
    assert len(touched) == 4
    check = (
        "from hemoco.config import RidgeConfig; import pipeline.transfer.units as u; u.run_ridge"
    )
    commands = (
        ["-m", "ruff", "check", *touched],
        ["-m", "pytest", "-q", "tests/unit/transfer/test_ridge.py"],
        ["-c", check],
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
