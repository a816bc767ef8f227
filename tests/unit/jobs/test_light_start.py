"""Help pages and usage errors do not import the packages that take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import _VERBS

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "ray", "mlflow", "timm", "pandas", "pyarrow", "matplotlib", "sklearn")
RECIPE = "cifar10_resnet18_mocov2"
SCRIPT = f"""
import sys
from jobs.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
print("status", status, "heavy", [name for name in {HEAVY} if name in sys.modules])
"""
ALL_HELP = f"""
import sys
from jobs.cli import _VERBS, main
with_recipe = [[verb, {RECIPE!r}] for verb in ("run", "sweep", "preflight")]
for words in [[], *([verb] for verb in _VERBS), *with_recipe]:
    try:
        status = main([*words, "--help"])
    except SystemExit as ended:
        status = ended.code
    print("status", status, *words, "heavy", [name for name in {HEAVY} if name in sys.modules])
"""


def last_lines(script: str, *words: str) -> list[str]:
    """The lines that the script itself prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if line.startswith("status ")]


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    lines = last_lines(ALL_HELP)
    assert len(lines) == 1 + len(_VERBS) + 3
    assert [
        line for line in lines if not line.startswith("status 0 ") or not line.endswith("heavy []")
    ] == []


@pytest.mark.parametrize(
    "words",
    [
        ("pretran",),
        ("run", "cifar10_resnet18_moco2"),
        ("run", RECIPE, "--pretrain.optimiser.lr", "0.1"),
        ("run", RECIPE, "--pretrain.moco.temperature", "-1"),
        ("submit", "run", RECIPE, "--pretrain.epochs", "many"),
        ("transfer", RECIPE),
        ("export", "backbone", "dest", "--format", "keras"),
        ("embed", "shards", "backbone", "dest", "--cpus", "0"),
    ],
    ids=" ".join,
)
def test_wrong_usage_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    assert last_lines(SCRIPT, *words) == ["status 2 heavy []"]
