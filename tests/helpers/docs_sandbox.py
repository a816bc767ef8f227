"""A home folder of its own in which the commands of docs/ run as they are printed.

`uv run X` runs X with the Python of the tests. Nothing of the user's environment is seen: no S3, no
MLflow, no Ray.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.helpers.docs_pages import Block, console_commands
from tests.helpers.house import ROOT

_HIDDEN = ("AWS_", "HEMOCO_", "MLFLOW_", "RAY_")
_SETTINGS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}
HOME = "/home/me"
"""The folder that pages show instead of the sandbox."""


class Sandbox:
    """A home folder and its sub-folder `hemoco`, in which commands run."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "hemoco"
        self.folder.mkdir(parents=True)
        shim = home / "bin" / "uv"
        shim.parent.mkdir()
        shim.write_text('#!/bin/sh\nshift\nexec "$@"\n')
        shim.chmod(0o755)
        visible = {
            name: value for name, value in os.environ.items() if not name.startswith(_HIDDEN)
        }
        path = f"{shim.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = visible | _SETTINGS | {"HOME": str(home), "PATH": path}

    def run(self, command: str) -> str:
        """Output of a shell command, errors included, with `/home/me` for the sandbox.

        Raises:
            AssertionError: the command failed.
        """
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        output = done.stdout.replace(str(self.home), HOME)
        assert done.returncode == 0, f"{command}\n{output[-3000:]}"
        return output

    def save(self, block: Block) -> None:
        """Writes the file that a block shows."""
        (self.folder / block.file).write_text(block.text + "\n")


def shortened(output: str, comment: str) -> list[str]:
    """The lines of an output that a page shows, with `...` for those between.

    Args:
        output: all of it.
        comment: above the block: `shown: first 3, from "Transfers" to "lower", last 2`, any of the
            three; the quoted texts are how lines begin. Without `shown:` every line is shown.
    """
    lines = [line.rstrip() for line in output.strip("\n").splitlines()]
    if not comment.startswith("shown: "):
        return lines
    chosen: set[int] = set()
    for part in comment.removeprefix("shown: ").split(", "):
        words = shlex.split(part)
        if words[0] == "first":
            chosen |= set(range(int(words[1])))
        elif words[0] == "last":
            chosen |= set(range(len(lines) - int(words[1]), len(lines)))
        else:
            first = _line_that_begins(lines, words[1], after=0)
            chosen |= set(range(first, _line_that_begins(lines, words[3], after=first) + 1))
    shown: list[str] = []
    for number, line in enumerate(lines):
        if number in chosen:
            shown.append(line)
        elif shown[-1:] != ["..."]:
            shown.append("...")
    return shown


def _line_that_begins(lines: list[str], text: str, *, after: int) -> int:
    for number in range(after, len(lines)):
        if lines[number].lstrip().startswith(text):
            return number
    raise AssertionError(f"no line of the output begins with {text!r}:\n" + "\n".join(lines))


def stable_part(lines: list[str]) -> list[str]:
    """Lines with all that may differ between runs made equal: numbers, digests, marks, spacing."""
    stable = []
    for line in lines:
        text = re.sub(r"\b(?=\w*\d)[0-9a-f]{8,}\b", "#", line)
        text = re.sub(r"[-+±]?\d[\d.,]*", "#", text)
        text = re.sub(r"# (s|min|h|[kMG]?B)\b", "# unit", text)
        text = re.sub(r"# ?[*?](?=\s|$)", "#", text)
        stable.append(re.sub(r"[\s─━-]+", " ", text).strip())
    return stable


def run_page(sandbox: Sandbox, page_blocks: list[Block]) -> list[tuple[Block, str, list[str]]]:
    """Runs the blocks of a page in their order: files are written, `console` and `bash` blocks run.

    Blocks with a comment that begins with `not run` are passed over.

    Returns:
        Each `console` block with its command and the lines of output that the page should show.
    """
    seen = []
    for block in page_blocks:
        if not block.runs:
            continue
        if block.file:
            sandbox.save(block)
        elif block.language == "bash":
            sandbox.run(block.text)
        elif block.language == "console":
            for command, _ in console_commands(block.text):
                seen.append((block, command, shortened(sandbox.run(command), block.comment)))
    return seen
