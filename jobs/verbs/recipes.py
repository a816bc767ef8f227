"""`python -m jobs recipes [CLASS]`: the recipes that come with hemoco, or what the settings of a class are."""

import ast
import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from hemoco import config
from hemoco.errors import UsageError
from jobs.options import load_recipe, recipe_names


def main(argv: list[str]) -> None:
    """Prints."""
    tyro.cli(recipes, args=argv, prog="python -m jobs recipes")


def recipes(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CLASS")] = "", /
) -> None:
    """The recipes that come with hemoco, or the settings of a class of which recipes are made.

    Args:
        name: a class of hemoco.config, for example KnnConfig; default: the recipes.
    """
    if name:
        _explain(name)
    for recipe in recipe_names():
        text = (Path(__file__).parents[1] / "recipes" / f"{recipe}.py").read_text()
        doc = ast.get_docstring(ast.parse(text)) or ""
        print(f"{recipe:<32} {doc.splitlines()[0] if doc else ''}")


def _explain(name: str) -> NoReturn:
    """Prints the help of a class.

    Raises:
        UsageError: there is none of this name.
        SystemExit: 0, after printing.
    """
    known = {
        each: getattr(config, each)
        for each in config.__all__
        if dataclasses.is_dataclass(getattr(config, each))
    }
    if name not in known:
        if name in recipe_names():
            raise UsageError(
                f"{name} is a recipe: `python -m jobs run {name} --help` shows its settings"
            )
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        raise UsageError(f"{name!r} is no class of hemoco.config: {hint}")
    # what these hold has no type of its own until somebody gives it
    examples: dict[str, Callable[[], object]] = {
        "Choice": lambda: config.Choice((0.1, 0.2)),
        "Recipe": lambda: load_recipe("demo"),
        "SweepConfig": lambda: load_recipe("cifar10_resnet18_sweep").sweep,
    }
    default = examples[name]() if name in examples else tyro.MISSING_NONPROP
    options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    tyro.cli(
        known[name],
        args=["--help"],
        default=default,
        prog=name,
        config=options,
        use_underscores=True,
    )
    raise AssertionError("help ends it")
