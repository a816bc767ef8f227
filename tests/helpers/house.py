"""The top-level packages of the code, their order, and the imports in their files."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
ROOMS = {
    "hemoco": {"hemoco"},
    "pipeline": {"hemoco", "pipeline"},
    "cluster": {"hemoco", "cluster"},
    "jobs": {"hemoco", "pipeline", "cluster", "jobs"},
}
ORDER = (
    "hemoco",  # files at its root
    "hemoco.config",
    "hemoco.storage",
    "hemoco.data",
    "hemoco.tracking",
    "hemoco.models",
    "hemoco.train",
    "hemoco.backbones",
    "hemoco.features",
    "hemoco.transfer",
    "hemoco.results",
    "hemoco.report",
)
"""A package of hemoco imports only what stands before it: docs/architecture.md."""


class Import(NamedTuple):
    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.module}"


def imports_of(room: str) -> Iterator[Import]:
    """Yields every module that a package's files import, anywhere in the file."""
    for path in sorted((ROOT / room).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(file, node.lineno, alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                for alias in node.names:
                    submodule = f"{module}.{alias.name}"
                    is_module = (ROOT / submodule.replace(".", "/")).with_suffix(".py").is_file()
                    yield Import(file, node.lineno, submodule if is_module else module)


def package_of(module: str) -> str:
    """Returns the package of a module: `hemoco.data` for `hemoco.data.stream.order`.

    A file at the root of hemoco belongs to `hemoco`.
    """
    parts = module.split(".")
    return (
        ".".join(parts[:2])
        if len(parts) > 1 and (ROOT / parts[0] / parts[1]).is_dir()
        else parts[0]
    )


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
