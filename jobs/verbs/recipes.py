"""`python -m jobs recipes [CLASS]`: the shipped recipes, or the settings of a config class."""

import ast
import dataclasses
import difflib
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Annotated, NoReturn

import tyro

from hemoco import config
from hemoco.errors import UsageError
from jobs.arguments import read_arguments
from jobs.options import load_recipe, recipe_names, recipe_path

_Class = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="[CLASS]", help_behavior_hint="")
]


def main(argv: list[str]) -> None:
    """Prints the recipes, or the settings of a class."""
    read_arguments(recipes, argv, command="recipes")


def recipes(name: _Class = "", /) -> None:
    """Lists the shipped recipes, or explains the settings of a class of which recipes are made.

    Args:
        name: a class of hemoco.config, for example KnnConfig; default: list the recipes.
    """
    if name:
        _explain(name)
    names = recipe_names()
    indent = max(len(recipe) for recipe in names) + 2
    for recipe in names:
        docstring = ast.get_docstring(ast.parse(recipe_path(recipe).read_text())) or ""
        title = docstring.partition("\n")[0]
        line = f"{recipe:<{indent}}{title}"
        if sys.stdout.isatty():  # a pipe gets one line for each recipe
            width = shutil.get_terminal_size().columns
            line = textwrap.fill(line, width, subsequent_indent=" " * indent)
        print(line)


def _explain(name: str) -> NoReturn:
    """Prints the settings of a class.

    Raises:
        UsageError: there is no class of this name.
        SystemExit: 0, after printing.
    """
    classes = {
        each: getattr(config, each)
        for each in config.__all__
        if dataclasses.is_dataclass(getattr(config, each))
    }
    if name not in classes:
        if name in recipe_names():
            raise UsageError(
                f"{name} is a recipe: `python -m jobs run {name} --help` shows its settings"
            )
        close = difflib.get_close_matches(name, classes, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(classes)}"
        raise UsageError(f"{name!r} is not a class of hemoco.config: {hint}")
    # fields of these are mappings or unions: tyro shows flags only for the values of an example
    examples: dict[str, Callable[[], object]] = {
        "Choice": lambda: config.Choice((0.1, 0.2)),
        "Recipe": lambda: load_recipe("demo"),
        "SweepConfig": lambda: load_recipe("cifar10_resnet18_sweep").sweep,
    }
    default = examples[name]() if name in examples else tyro.MISSING_NONPROP
    read_arguments(
        classes[name],
        ["--help"],
        command=f"recipes {name}",
        default=default,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )
    raise AssertionError("--help exits")
