"""Runs the commands of docs/tutorial.md and writes their output into the page.

    uv run python -m tests.helpers.write_tutorial

Takes about two minutes on two cores. Everything between the commands stays as it is.
"""

import tempfile
from pathlib import Path

from tests.helpers.docs_pages import blocks
from tests.helpers.docs_sandbox import Sandbox, run_page
from tests.helpers.house import ROOT

PAGE = "docs/tutorial.md"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="hemoco-tutorial-") as folder:
        seen = run_page(Sandbox(Path(folder) / "me"), blocks(PAGE))
    text = (ROOT / PAGE).read_text()
    for block, command, output in seen:
        text = text.replace(block.text, "\n".join([f"$ {command}", *output]))
        print(f"{block}: {len(output)} lines of output")
    (ROOT / PAGE).write_text(text)


if __name__ == "__main__":
    main()
