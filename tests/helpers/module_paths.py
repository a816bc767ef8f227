"""Finding a test module by its name, whichever folder it lies in."""

from pathlib import Path

_TESTS = Path(__file__).parents[1]


def module_path(name: str) -> Path:
    """The file `test_{name}.py` below tests/; its name is unique there."""
    (path,) = _TESTS.rglob(f"test_{name}.py")
    return path
