"""Command lines read by tyro: one call for all verbs, and the types of their arguments."""

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

import tyro

# An empty hint hides tyro's "(default: '')": the help text of such an argument says what the
# default is.
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
Folder = Annotated[str, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
File = Annotated[str, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Url = Annotated[str, tyro.conf.arg(metavar="URL", help_behavior_hint="")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]

ResultT = TypeVar("ResultT")


def read_arguments(
    target: Callable[..., ResultT],
    argv: list[str],
    *,
    command: str,
    default: Any = tyro.MISSING_NONPROP,
    config: tuple[Any, ...] = (),
) -> ResultT:
    """Reads a command line and calls the target with its values.

    Args:
        target: a function, whose docstring and parameters become the help page and the options; or
            a config class.
        argv: what follows the command.
        command: the command as the help page shows it, without `python -m jobs`.
        default: for a config class, the value over which the command line is read.
        config: further settings of tyro.

    Returns:
        What the target returns.

    Raises:
        SystemExit: 2 for a wrong command line, 0 after --help.
    """
    _join_wrapped_lines(target)
    return tyro.cli(
        target,
        args=argv,
        default=default,
        prog=f"python -m jobs {command}",
        config=config,
        use_underscores=True,
    )


def _join_wrapped_lines(target: Callable[..., Any]) -> None:
    """Joins the wrapped lines of help texts.

    tyro keeps the line breaks of indented docstrings, so that help pages would break in the middle
    of a sentence. `test_help_texts_are_wrapped_by_the_terminal_only` shows it.
    """
    if not isinstance(target, type):
        # Arguments stand four columns in, their further lines eight.
        target.__doc__ = re.sub(r"\n {8,}", " ", inspect.cleandoc(target.__doc__ or ""))
        return
    for name, module in sys.modules.copy().items():
        if name.startswith(("hemoco.config", "jobs.options")):
            _describe_fields(module)


def _describe_fields(module: ModuleType) -> None:
    """Copies the docstrings under dataclass fields to the fields' metadata, which tyro prefers."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        owner = getattr(module, node.name)
        if not dataclasses.is_dataclass(owner):
            continue
        fields = {field.name: field for field in dataclasses.fields(owner)}
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                text = " ".join(following.value.value.split())
                field: Any = fields[statement.target.id]
                field.metadata = {"help": text}
