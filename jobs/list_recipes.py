"""`python -m jobs recipes`: the recipes that come with hemoco."""

import ast
from pathlib import Path

from jobs.options import recipe_names


def main(argv: list[str]) -> None:
    """Prints each recipe with the first line of its docstring."""
    del argv
    for name in recipe_names():
        text = (Path(__file__).parent / "recipes" / f"{name}.py").read_text()
        doc = ast.get_docstring(ast.parse(text)) or ""
        print(f"{name:<28} {doc.splitlines()[0] if doc else ''}")
