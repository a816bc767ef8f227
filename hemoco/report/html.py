"""A page of HTML that needs nothing else: no script, no request, images inside."""

import base64
from collections.abc import Sequence
from html import escape

from hemoco.report.tables import Section

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: #1f2328; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 .5rem; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid #dfe2e6; border-radius: 8px; padding: 1.1rem 1.25rem; margin: 1rem 0; }
.kicker { margin: 0; color: #57606a; }
.verdict { font-size: 1.15rem; margin: .5rem 0 0; }
.columns { column-count: 2; column-gap: 1rem; margin-top: 1rem; }
.columns > * { break-inside: avoid; margin: 0 0 1rem; }
.scroll { overflow-x: auto; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption, .note { color: #57606a; font-size: .875rem; margin: .5rem 0 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #e6e8eb; vertical-align: top; }
thead th { color: #57606a; font-size: .875rem; font-weight: 600; }
tbody th { font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
td code, dd code { overflow-wrap: anywhere; }
code { font: .875em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
ul { list-style: none; margin: 0; padding: 0; }
li { padding: .35rem 0; }
.mark { display: inline-block; min-width: 4.2rem; text-align: center; border-radius: 4px; padding: 0 .4rem;
  margin-right: .6rem; font-weight: 700; font-size: .875rem; }
.pass { background: #d7f0e6; color: #00573f; }
.fail { background: #fbe0d0; color: #8a3500; }
.unknown { background: #e6e8eb; color: #4a5158; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1rem; margin: 0; }
dt { color: #57606a; }
dd { margin: 0; overflow-wrap: anywhere; }
.finding { display: block; margin: .15rem 0 0; }
summary { cursor: pointer; font-weight: 600; }
.key { display: inline-block; margin: .5rem .9rem 0 0; font-size: .875rem; white-space: nowrap; }
.key i { display: inline-block; width: .85em; height: .85em; margin-right: .35em; border-radius: 2px;
  vertical-align: -.05em; }
.neighbours { display: grid; gap: .5rem .4rem; align-items: start; max-width: 660px; }
.neighbours figure { text-align: center; min-width: 0; }
.neighbours img { image-rendering: pixelated; border-radius: 4px; }
.neighbours figcaption { margin: .1rem 0 0; font-size: .75rem; line-height: 1.25; overflow-wrap: anywhere; }
.neighbours .query { border-right: 2px solid #dfe2e6; padding-right: .4rem; }
@media (max-width: 760px) {
  main { padding: 1rem .6rem 2rem; }
  section { padding: .9rem .8rem; }
  table { font-size: .9rem; }
  th, td { padding-right: .7rem; }
  thead th { font-size: .8rem; }
  .columns { column-count: 1; }
  .neighbours figcaption { font-size: .65rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


def page(title: str, header: str, parts: Sequence[str]) -> str:
    """The document.

    Args:
        title: plain text.
        header: HTML.
        parts: HTML; empty ones are left out.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)} - hemoco</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in [header, *parts] if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A box with a heading (plain text) above HTML."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def columns(parts: Sequence[str]) -> str:
    """Boxes two beside each other, below each other on a phone; nothing for none."""
    shown = "".join(parts)
    return f'<div class="columns">{shown}</div>' if shown else ""


def plot(title: str, svg: bytes, alt: str, caption: str) -> str:
    """A box with a plot.

    Args:
        title: plain text.
        svg: the plot.
        alt: what it shows, for those who cannot see it; plain text.
        caption: plain text.
    """
    image = f'<img src="{data_uri(svg, "image/svg+xml")}" alt="{escape(alt)}"/>'
    return section(title, f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")


def table(found: Section) -> str:
    """A section's table with its notes, as HTML without its title."""
    kinds = ["" if place < found.heads else ' class="number"' for place in range(len(found.columns))]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(found.columns, kinds, strict=True)
    )
    rows = []
    for number, row in enumerate(found.rows):
        cells = []
        for place, (cell, kind) in enumerate(zip(row, kinds, strict=True)):
            text = f"<strong>{escape(cell)}</strong>" if (number, place) in found.best else escape(cell)
            cells.append(f"<td{kind}>{text}</td>" if place else f'<th scope="row"{kind}>{text}</th>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in found.notes)
    head = f"<thead><tr>{heads}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>{notes}'


def folded(summary: str, body: str) -> str:
    """HTML that is shown when its summary (plain text) is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def data_uri(data: bytes, kind: str) -> str:
    """A file as the address of itself."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
