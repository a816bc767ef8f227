"""README.md and the pages below docs/, taken apart: code blocks, links, headings, inline code."""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from tests.helpers.house import ROOT

_FENCE = re.compile(r"```(\w*)\s*$")
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->\s*$")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    """Path of the page, from the root of the checkout."""
    line: int
    """Number of its first line of code in the page, from 1."""
    language: str
    """`bash`, `console`, `python`, `diff`, `text`, or nothing for an indented block."""
    comment: str
    """Text of the HTML comment on the line above the fence; empty where there is none."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str:
        """Name of the file that the block shows, `file: NAME` in the comment; else empty."""
        return self.comment.removeprefix("file: ") if self.comment.startswith("file: ") else ""

    @property
    def runs(self) -> bool:
        """False if the comment is `not run: REASON`."""
        return not self.comment.startswith("not run")


def pages() -> list[str]:
    """README.md and every Markdown file below docs/, as paths from the root of the checkout."""
    below = sorted((ROOT / "docs").rglob("*.md"))
    return ["README.md", *(path.relative_to(ROOT).as_posix() for path in below)]


def blocks(page: str) -> list[Block]:
    """All code blocks of a page, in their order."""
    return list(_blocks(page, (ROOT / page).read_text().splitlines()))


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence:
            comment = _COMMENT.match(lines[number - 1]) if number else None
            first = number + 1
            number = lines.index("```", first)
            text = "\n".join(lines[first:number])
            yield Block(page, first + 1, fence[1], comment[1] if comment else "", text)
        elif lines[number].startswith("    ") and (not number or not lines[number - 1].strip()):
            first = number
            while number < len(lines) and (
                lines[number].startswith("    ") or not lines[number].strip()
            ):
                number += 1
            text = "\n".join(line[4:] for line in lines[first:number])
            yield Block(page, first + 1, "", "", text.rstrip())
            continue
        number += 1


def prose(page: str) -> str:
    """The text of a page without its code blocks."""
    lines = (ROOT / page).read_text().splitlines()
    for block in blocks(page):
        for number in range(block.line - 1, block.line - 1 + block.text.count("\n") + 1):
            lines[number] = ""
    return "\n".join(lines)


def links(page: str) -> list[str]:
    """Targets of the links and images of a page, except those with a scheme (https:, mailto:)."""
    targets = _LINK.findall(prose(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        number, anchor = 0, slug
        while anchor in found:
            number += 1
            anchor = f"{slug}-{number}"
        found.add(anchor)
    return found


def table_cells(line: str) -> list[str]:
    """Texts of the cells of a row."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def inline_code(page: str) -> list[str]:
    """Texts between single backticks in the text of a page.

    Of a table with a column `ours`, the other columns are left out: they have names of others.
    """
    texts: list[str] = []
    column: int | None = None
    previous = ""
    for line in prose(page).splitlines():
        cells = table_cells(line)
        if not line.startswith("|"):
            column = None
        elif not previous.startswith("|"):
            column = cells.index("ours") if "ours" in cells else None
        previous = line
        texts += _CODE.findall(line if column is None else cells[column])
    return texts


def shell_commands(text: str) -> list[list[str]]:
    """The simple commands of a script as lists of arguments; of a `console` block after `$ `.

    Continued lines are joined and comments dropped. Pipes, `&&`, `;` and `&` separate commands.
    """
    if re.search(r"^\$ ", text, re.MULTILINE):
        text = "\n".join(command for command, _ in console_commands(text))
    text = re.sub(r"(^|[ ])#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    commands: list[list[str]] = [[]]
    for token in lexer:
        if set(token) <= set(";&|\n"):
            commands.append([])
        else:
            commands[-1].append(token)
    return [command for command in commands if command]


def console_commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a `console` block with the output that the page shows below each."""
    found: list[tuple[str, list[str]]] = []
    continued = False
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif continued:
            command, output = found[-1]
            found[-1] = (f"{command}\n{line}", output)
        else:
            found[-1][1].append(line)
            continue
        continued = line.endswith("\\") or found[-1][0].count('"') % 2 == 1
    return found
