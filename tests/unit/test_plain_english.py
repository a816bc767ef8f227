"""Docstrings open with a sentence or a noun phrase that stands alone: docs/style.md, rule 2."""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from tests.helpers.house import ROOMS, ROOT

FOLDERS = (*ROOMS, "tests", ".ci")
DATA = ROOT / "tests" / "data"  # scripts there are kept as an old version ran them
FORBIDDEN = {"of", "as", "by", "what", "who", "whose", "how", "where", "when", "whether"}


ELLIPTICAL_ARGUMENT = re.compile(r"^ +\w+: (?:of|as|by) ", re.MULTILINE)
"""An entry under `Args:` that begins in mid-sentence, such as `url: of the folder`."""


class Docstring(NamedTuple):
    """The docstring of a module, class or function, or the string under a field."""

    line: int
    opening: str
    """Its first line."""
    text: str


def docstrings(source: str) -> Iterator[Docstring]:
    """Yields every string that is a statement: docstrings, and the strings under fields."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str) and text.strip():
                yield Docstring(node.lineno, text.strip().splitlines()[0], text)


def opens_badly(opening: str) -> bool:
    first_word = re.match(r"\w+", opening)
    return first_word is not None and first_word[0].lower() in FORBIDDEN


def test_no_docstring_opens_with_a_word_that_needs_the_line_above() -> None:
    bad = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_relative_to(DATA):
                continue
            for found in docstrings(path.read_text(encoding="utf-8")):
                if opens_badly(found.opening) or ELLIPTICAL_ARGUMENT.search(found.text):
                    bad.append(f"{path.relative_to(ROOT)}:{found.line} {found.opening}")
    assert not bad, f"{len(bad)} docstrings to reword:\n" + "\n".join(bad)


def test_docstrings_of_modules_classes_functions_and_fields_are_read() -> None:
    source = '''"""Of a module."""
class A:
    """What a class is."""
    field: int = 0
    """By name."""
    async def f(self):
        """
        Whether it holds.
        """
        return "As a value, not a docstring"
LIMIT = 3
"""Where it ends."""
'''
    openings = {found.opening for found in docstrings(source)}
    assert openings == {
        "Of a module.",
        "What a class is.",
        "By name.",
        "Whether it holds.",
        "Where it ends.",
    }
    assert all(map(opens_badly, openings))


def test_entries_of_arguments_that_begin_in_mid_sentence_are_found() -> None:
    assert ELLIPTICAL_ARGUMENT.search("Reads.\n\n    Args:\n        url: of the folder.\n")
    assert not ELLIPTICAL_ARGUMENT.search("Reads.\n\n    Args:\n        url: URL of the folder.\n")


def test_openings_that_stand_alone_pass() -> None:
    for opening in (
        "Offset of a shard.",
        "`as` in a table.",
        "Assigns.",
        "Bytes read.",
        "(G,) keys.",
    ):
        assert not opens_badly(opening)
