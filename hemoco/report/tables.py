"""Tables with a title and notes, as terminal text, Markdown, LaTeX and CSV."""

import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Value = str | int | float | bool | None
_LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"\dag{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
}

_UNBOUNDED = 10_000
"""Width in characters that no table reaches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A table, as text for people and as records for programs."""

    name: str
    """Stem of its CSV file and key in the JSON."""
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    heads: int = 1
    """Number of columns, from the left, that name a row; each part of a split table has them."""
    joined: frozenset[int] = frozenset()
    """Columns that stay beside their left neighbour where a table is split."""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the cells set in bold."""
    notes: tuple[str, ...] = ()
    records: tuple[dict[str, Value], ...] = ()


def print_section(console: "Console", section: Section) -> None:
    """Prints a table, split into several where the terminal is too narrow for all columns."""
    from rich.text import Text

    console.print(Text(f"\n{section.title}", style="bold"))
    for index, columns in enumerate(_parts(console, section)):
        if index:
            console.print()
        console.print(_rich_table(section, columns))
    for note in section.notes:
        # a dagger marks what failed or is unfinished, which must not be overlooked
        console.print(Text(note, style="bold red" if note.startswith("†") else "dim"))


def markdown(sections: Iterable[Section]) -> str:
    """Returns a heading, a table and a list of notes for each section."""
    return "\n".join(_markdown(section) for section in sections)


def latex(sections: Iterable[Section]) -> str:
    """Returns a table environment for each section, with booktabs rules and the notes below."""
    return "% \\usepackage{booktabs}\n\n" + "\n".join(_latex(section) for section in sections)


def csv_text(records: Sequence[dict[str, Value]], names: Sequence[str] = ()) -> str:
    """Returns records as CSV; a value that a record lacks is empty.

    Args:
        records: one for each line.
        names: the columns; without them, all names in the records, in order of appearance.
    """
    text = io.StringIO()
    names = names or list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _parts(console: "Console", section: Section) -> list[list[int]]:
    """Splits a table to fit the console.

    Returns:
        The columns of each part: the heads, and as many others as fit, at least one.
    """
    blocks: list[list[int]] = []
    for column in range(section.heads, len(section.columns)):
        if column in section.joined:
            blocks[-1].append(column)
        else:
            blocks.append([column])
    # Measured with its own width as the limit, rich would report any table as fitting.
    unbounded = console.options.update_width(_UNBOUNDED)
    heads = list(range(section.heads))
    parts: list[list[int]] = []
    part = heads
    for block in blocks:
        table = _rich_table(section, [*part, *block])
        fits = console.measure(table, options=unbounded).maximum <= console.width
        if not fits and part != heads:
            parts.append(part)
            part = heads
        part = [*part, *block]
    return [*parts, part]


def _rich_table(section: Section, columns: Sequence[int]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        header_style="bold",
    )
    for column in columns:
        table.add_column(
            Text(section.columns[column]),
            justify="left" if column < section.heads else "right",
            overflow="fold",
        )
    for index, row in enumerate(section.rows):
        cells = []
        for column in columns:
            style = "bold green" if (index, column) in section.best else ""
            cells.append(Text(row[column], style=style))
        table.add_row(*cells)
    return table


def _markdown(section: Section) -> str:
    rule = ["---" if column < section.heads else "---:" for column in range(len(section.columns))]
    rows = [section.columns, rule]
    for index, row in enumerate(section.rows):
        rows.append(
            [
                f"**{cell}**" if (index, column) in section.best else cell
                for column, cell in enumerate(row)
            ]
        )
    lines = [f"## {section.title}", ""]
    for cells in rows:
        escaped = [cell.replace("|", r"\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    if section.notes:
        lines.append("")
    for note in section.notes:
        lines.append("- " + re.sub(r"([|*_<>])", r"\\\1", note))
    return "\n".join(lines) + "\n"


def _latex(section: Section) -> str:
    columns = "l" * section.heads + "r" * (len(section.columns) - section.heads)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(section.title)}}}",
        rf"\label{{tab:{section.name.replace('_', '-')}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_tex, section.columns)) + r" \\",
        r"\midrule",
    ]
    for index, row in enumerate(section.rows):
        cells = []
        for column, cell in enumerate(row):
            is_best = (index, column) in section.best
            cells.append(rf"\textbf{{{_tex(cell)}}}" if is_best else _tex(cell))
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip\footnotesize {_tex(note)}" for note in section.notes]
    lines += [r"\end{table}", ""]
    return "\n".join(lines)


def _tex(text: str) -> str:
    """Escapes text for LaTeX; "->" becomes an arrow, and a leading sign of a number a real one."""
    parts = []
    for part in text.split("->"):
        parts.append("".join(_LATEX.get(char, char) for char in part))
    return re.sub(r"^([+-])(?=\d)", r"$\1$", r"$\to$".join(parts))
