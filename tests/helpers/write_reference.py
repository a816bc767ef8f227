"""Writes the parts of docs/reference that come from the code.

    uv run python -m tests.helpers.write_reference

A page is prose with blocks `<!-- begin NAME -->` ... `<!-- end NAME -->`; only the blocks are
written. `tests/unit/test_reference.py` fails where one is stale.
"""

import re
from collections.abc import Callable

from hemoco.tracking.tags import Tag
from tests.helpers.house import ROOT
from tests.helpers.reference_commands import commands_blocks
from tests.helpers.reference_files import files_blocks
from tests.helpers.reference_settings import settings_blocks
from tests.helpers.reference_text import commented_groups, field_docs

FOLDER = ROOT / "docs" / "reference"


def record_blocks() -> dict[str, str]:
    """Text of each block of docs/reference/record.md."""
    docs = field_docs(Tag)
    groups = []
    for comment, names in commented_groups(Tag):
        lines = [f"**{comment[0].upper()}{comment[1:]}**", ""]
        for name in names:
            meaning = f": {docs[name]}" if name in docs else ""
            lines.append(f"- `{getattr(Tag, name)}`{meaning}")
        groups.append("\n".join(lines))
    return {"tags": "\n\n".join(groups)}


PAGES: dict[str, Callable[[], dict[str, str]]] = {
    "settings.md": settings_blocks,
    "commands.md": commands_blocks,
    "record.md": record_blocks,
    "files.md": files_blocks,
}


def page(name: str) -> str:
    """The page as it should be: its prose as it stands, its blocks from the code."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    for block, content in PAGES[name]().items():
        pattern = rf"(<!-- begin {block} -->\n).*?(<!-- end {block} -->)"
        assert re.search(pattern, text, re.S), f"docs/reference/{name} has no block {block}"
        text = re.sub(
            pattern, lambda found, new=content: f"{found[1]}\n{new}\n\n{found[2]}", text, flags=re.S
        )
    return text


if __name__ == "__main__":
    for name in PAGES:
        (FOLDER / name).write_text(page(name), encoding="utf-8")
        print(f"docs/reference/{name}")
