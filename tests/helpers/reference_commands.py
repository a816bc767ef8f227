"""The sections of docs/reference/commands.md, from the verbs' functions and option classes."""

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

from jobs import cli
from jobs.options import RunOptions
from jobs.verbs import backbones, submit
from tests.helpers.reference_text import (
    argument_docs,
    field_docs,
    paragraphs,
    type_text,
    value_text,
)

_SOURCES = "SOURCE [SOURCE ...] DEST"
"""The only positional argument of `pack`: its last value is the destination."""


def commands_blocks() -> dict[str, str]:
    """Text of each block of the page."""
    return {"commands": "\n\n".join(_section(verb) for verb in cli._VERBS)}


def _section(verb: str) -> str:
    lines = [f"## {verb}", "", f"*{cli._VERBS[verb]}*", ""]
    if verb in submit._OPTIONS:
        lines += _recipe_verb(verb, submit._OPTIONS[verb])
    elif verb == "submit":
        lines += ["```text", submit._USAGE.strip(), "```"]
    elif verb == "backbones":
        for name, action in backbones._ACTIONS.items():
            lines += [*_function(f"backbones {name}", action), ""]
    else:
        module = importlib.import_module(f"jobs.verbs.{cli._MODULES.get(verb, verb)}")
        lines += _function(verb, _only_command(module, verb))
    return "\n".join(lines).strip()


def _only_command(module: Any, verb: str) -> Callable[..., None]:
    """The function whose signature is the verb's command line."""
    function: Callable[..., None] = getattr(module, verb, None) or getattr(
        module, f"{verb}_checkpoint"
    )
    return function


def _recipe_verb(verb: str, options: type[RunOptions]) -> Iterator[str]:
    flag = " --backbone URL" if verb == "transfer" else ""
    yield from _usage(f"python -m jobs {verb} RECIPE{flag} [--setting value ...]")
    module = importlib.import_module(f"jobs.verbs.{verb}")
    yield paragraphs(module.main.__doc__)
    yield ""
    yield "- **`RECIPE`**: name of a shipped recipe, or path of a Python file that defines one"
    docs = field_docs(options)
    for field in dataclasses.fields(options):
        if field.name != "recipe":
            yield _option(field.name, field.type, field.default, docs[field.name])


def _function(command: str, function: Callable[..., None]) -> Iterator[str]:
    """Usage, description and options of a verb whose command line is a function's signature."""
    parameters = inspect.signature(function).parameters.values()
    hints = typing.get_type_hints(function, include_extras=True)
    docs = argument_docs(function)
    places = {
        _metavar(each.name, hints[each.name]): each
        for each in parameters
        if each.kind is each.POSITIONAL_ONLY
    }
    flags = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    words = ["python -m jobs", command]
    words += [f"[{name}]" if each.default == "" else name for name, each in places.items()]
    required = [each.name for each in flags if each.default is each.empty]
    words += [f"--{name} {name.upper()}" for name in required]
    words += ["[options]"] if len(flags) > len(required) else []
    yield from _usage(" ".join(words))
    yield paragraphs(function.__doc__)
    yield ""
    for name, each in places.items():
        yield f"- **`{name}`**: {docs[each.name].removeprefix(f'{name}: ')}"
    for each in flags:
        yield _option(each.name, hints[each.name], each.default, docs[each.name])


def _usage(line: str) -> list[str]:
    return ["```text", line, "```", ""]


def _metavar(name: str, hint: Any) -> str:
    """The name of a positional argument on the command line."""
    for note in typing.get_args(hint)[1:]:
        if getattr(note, "metavar", None):
            return re.sub(r"^\[(.*)\]$", r"\1", str(note.metavar))
    return _SOURCES if name == "paths" else name.upper()


def _option(name: str, hint: Any, default: object, text: str) -> str:
    facts = [type_text(hint)]
    if default is inspect.Parameter.empty:
        facts.append("required")
    elif not isinstance(default, bool) and default not in ("", None, ()):
        facts.append(f"default {value_text(default)}")
    return f"- **`--{name}`** ({', '.join(facts)}): {text}"
