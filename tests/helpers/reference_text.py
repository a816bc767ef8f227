"""Facts for docs/reference, read from the code: docstrings, types, defaults, rules of settings."""

import ast
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal

from hemoco.errors import ConfigError

_PROBES = (-1, 0, 1_000_003)
"""Numbers that a setting with a rule is likely to refuse; the last is a prime."""


def paragraphs(text: str | None) -> str:
    """A docstring without its sections (`Args:`, `Raises:`, ...), each paragraph on one line."""
    body = re.split(r"^(?:Args|Raises|Returns|Yields):$", inspect.cleandoc(text or ""), flags=re.M)
    parts = re.split(r"\n\s*\n", body[0].strip())
    return "\n\n".join(" ".join(part.split()) for part in parts)


def field_docs(cls: type) -> dict[str, str]:
    """The strings under the fields of a class and of its bases, by field, each as one line."""
    docs: dict[str, str] = {}
    for each in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in itertools.pairwise(definition.body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def commented_groups(cls: type) -> list[tuple[str, list[str]]]:
    """The constants of a class in groups, each under the comment line above it."""
    groups: list[tuple[str, list[str]]] = []
    for line in inspect.getsource(cls).splitlines():
        comment = re.fullmatch(r"    # (.*)", line)
        name = re.match(r"    (\w+): Final = ", line)
        if comment:
            groups.append((comment[1], []))
        elif name:
            groups[-1][1].append(name[1])
    return groups


def argument_docs(function: Callable[..., Any]) -> dict[str, str]:
    """The entries of the section `Args:` of a function's docstring, each as one line."""
    section = re.search(r"^Args:\n(.*?)(?:\n\S|\Z)", inspect.getdoc(function) or "", re.M | re.S)
    docs: dict[str, str] = {}
    name = ""
    for line in section[1].splitlines() if section else []:
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start[1]
            docs[name] = start[2]
        elif name:
            docs[name] += " " + line.strip()
    return docs


def type_text(hint: Any) -> str:
    """A type as a reader would put it: `number`, `2 numbers`, `one of a, b`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return type_text(args[0])
    if origin in (typing.Union, types.UnionType):
        return type_text(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        return f"one of {code(args)}"
    if origin is tuple:
        plural = {int: "whole numbers", float: "numbers", str: "words"}[args[0]]
        return plural if args[1] is ... else f"{len(args)} {plural}"
    if origin is dict:
        return "dictionary"
    names = {int: "whole number", float: "number", str: "text", bool: "flag"}
    return names.get(hint, "value")


def value_text(value: object) -> str:
    """A default as it is typed on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in ((), ""):
        return "empty"
    items = value if isinstance(value, tuple) else (value,)
    texts = [f"{item:.4g}" if isinstance(item, float) else str(item) for item in items]
    return f"`{' '.join(texts)}`"


def code(names: Iterable[object]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def rules(build: Callable[[object], object], default: object, name: str) -> list[str]:
    """Rules for one setting, in the words of the messages for values that break them.

    Asking the checks keeps the page true: a rule that is changed or dropped changes the answer.

    Args:
        build: makes the config with another value of the setting.
        default: value of the setting.
        name: the setting's name in its class.
    """
    broken: dict[str, None] = {}
    for value in _probe_values(default):
        try:
            build(value)
        except ConfigError as error:
            about = re.fullmatch(rf"(?:[\w.]+\.)?{name} is .*?: (.*)", str(error), re.S)
            if about:
                broken[_without_values(about[1])] = None
        except (TypeError, ValueError):
            continue  # a tuple of another length than the check unpacks
    return list(broken)


def _probe_values(default: object) -> tuple[object, ...]:
    if isinstance(default, tuple):
        is_numbers = bool(default) and not isinstance(default[0], str)
        return ((), (-1,) * len(default)) if is_numbers else ((),)
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    return _PROBES if is_number else ()


def _without_values(rule: str) -> str:
    """A rule without the values of the config that was asked."""
    rule = re.sub(r" \([\d, ]+\)", "", rule)
    return re.sub(r"\b\d+ images\b", "images", rule).removeprefix("it ").rstrip(".")
