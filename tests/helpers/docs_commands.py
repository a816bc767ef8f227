"""Reading the commands that pages show with the real command line, without running them.

tyro is the last thing before a verb begins its work. Here it reads the arguments as always and
then ends the call.
"""

import contextlib
import functools
import io
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import tyro

from jobs.cli import main
from jobs.verbs.submit import _OPTIONS

_RECIPE = "cifar10_resnet18_mocov2"


class _Parsed(BaseException):
    """The arguments are right."""


def problem_with(argv: list[str]) -> str:
    """The error that `python -m jobs ARGV` prints; empty if it would begin to work.

    Args:
        argv: for RECIPE, or a file of the reader's own, a shipped recipe is read instead.
    """
    argv = _with_shipped_recipe([re.sub(r"\$\w+", "1", argument) for argument in argv])
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), _only_parsing():
        try:
            status: object = main(argv)
        except _Parsed:
            return ""
        except SystemExit as end:
            status = end.code
    # verbs without arguments of their own print and return 0
    return "" if status in (0, None) else f"{shlex.join(argv)}: {output.getvalue().strip()[-600:]}"


def jobs_commands(command: list[str]) -> Iterator[list[str]]:
    """Yields the arguments after `python -m jobs` in a command, or nothing if it calls no job."""
    for position in range(len(command) - 2):
        if command[position : position + 3] == ["python", "-m", "jobs"]:
            yield command[position + 3 :]


def _with_shipped_recipe(argv: list[str]) -> list[str]:
    argv = list(argv)
    position = 1 if argv[:1] == ["submit"] else 0
    if argv[position : position + 1] and argv[position] in _OPTIONS:
        recipe = argv[position + 1] if len(argv) > position + 1 else ""
        if recipe in ("RECIPE", "NAME") or recipe.endswith(".py"):
            argv[position + 1] = _RECIPE
    return argv


@contextlib.contextmanager
def _only_parsing() -> Iterator[None]:
    real = tyro.cli

    def parse(target: Any, **options: Any) -> Any:
        if not isinstance(target, type):

            @functools.wraps(target)
            def nothing(*_: Any, **__: Any) -> None:
                return None

            target = nothing
        real(target, **options)
        raise _Parsed

    # tests/unit has no server: were a verb not stopped here, it could reach nothing
    with mock.patch.object(tyro, "cli", parse), mock.patch.object(sys, "argv", ["jobs"]):
        yield
