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

_UNBOUNDED = 10_000  # columns of a terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One table, as text for people and as records for programs."""

    name: str
    """Of its file, and its key."""
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    heads: int = 1
    """Columns, from the left, that name a row: they stand at the left of every part of a table that is split."""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of cells that are set in bold."""
    notes: tuple[str, ...] = ()
    records: tuple[dict[str, Value], ...] = ()


def print_section(console: "Console", section: Section) -> None:
    """Prints a table, in parts side by side below each other where the terminal is too narrow for all columns."""
    from rich.text import Text

    console.print(Text(f"\n{section.title}", style="bold"))
    for number, columns in enumerate(_parts(console, section)):
        if number:
            console.print()
        console.print(_rich_table(section, columns))
    for note in section.notes:
        # a dagger marks what failed or is unfinished, which must not be overlooked
        console.print(Text(note, style="bold red" if note.startswith("†") else "dim"))


def markdown(sections: Iterable[Section]) -> str:
    """A heading, a table and a list of notes for each."""
    return "\n".join(_markdown(section) for section in sections)


def latex(sections: Iterable[Section]) -> str:
    """A table environment for each, with the rules of booktabs; the notes stand below."""
    return "% \\usepackage{booktabs}\n\n" + "\n".join(_latex(section) for section in sections)


def csv_text(records: Sequence[dict[str, Value]], names: Sequence[str] = ()) -> str:
    """One line per record, below these names, or all that any of them has; what is unknown is empty."""
    text = io.StringIO()
    names = names or list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _parts(console: "Console", section: Section) -> list[list[int]]:
    """The columns of each part: as many as fit, at least one besides the heads."""
    heads, parts = list(range(section.heads)), list[list[int]]()
    part, unbounded = list(heads), console.options.update_width(_UNBOUNDED)
    for column in range(section.heads, len(section.columns)):
        grown = [*part, column]
        # a measurement with the console's own options is cut to its width
        fits = (
            console.measure(_rich_table(section, grown), options=unbounded).maximum <= console.width
        )
        if fits or part == heads:
            part = grown
        else:
            parts.append(part)
            part = [*heads, column]
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
    for number, row in enumerate(section.rows):
        table.add_row(
            *(
                Text(row[column], style="bold green" if (number, column) in section.best else "")
                for column in columns
            )
        )
    return table


def _markdown(section: Section) -> str:
    rows = [
        [
            f"**{cell}**" if (number, column) in section.best else cell
            for column, cell in enumerate(row)
        ]
        for number, row in enumerate(section.rows)
    ]
    rule = ["---" if column < section.heads else "---:" for column in range(len(section.columns))]
    lines = [
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
        for row in (section.columns, rule, *rows)
    ]
    notes = ["", *(f"- {_escaped(note)}" for note in section.notes)] if section.notes else []
    return "\n".join([f"## {section.title}", "", *lines, *notes]) + "\n"


def _escaped(text: str) -> str:
    return re.sub(r"([|*_<>])", r"\\\1", text)


def _latex(section: Section) -> str:
    count = len(section.columns)
    rows = [
        [
            rf"\textbf{{{_tex(cell)}}}" if (number, column) in section.best else _tex(cell)
            for column, cell in enumerate(row)
        ]
        for number, row in enumerate(section.rows)
    ]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(section.title)}}}",
            rf"\label{{tab:{section.name.replace('_', '-')}}}",
            rf"\begin{{tabular}}{{{'l' * section.heads}{'r' * (count - section.heads)}}}",
            r"\toprule",
            " & ".join(map(_tex, section.columns)) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\smallskip\footnotesize {_tex(note)}" for note in section.notes),
            r"\end{table}",
            "",
        ]
    )


def _tex(text: str) -> str:
    escaped = r"$\to$".join(
        "".join(_LATEX.get(char, char) for char in part) for part in text.split("->")
    )
    return re.sub(r"^([+-])(?=\d)", r"$\1$", escaped)  # a minus, not a hyphen
