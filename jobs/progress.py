"""Output of verbs that process shards: a progress bar, and names made safe to print."""

from collections.abc import Generator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress as Bar

from pipeline.workers.tasks import Progress

ResultT = TypeVar("ResultT")


def follow(steps: Generator[Progress, None, ResultT]) -> ResultT:
    """Runs the steps and returns their result; shows a progress bar if the output is a terminal."""
    console = Console()
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards", total=None)
        while True:
            try:
                progress = next(steps)
            except StopIteration as finished:
                result: ResultT = finished.value
                return result
            bar.update(task, completed=progress.done, total=progress.total)


def printable(text: str) -> str:
    """Replaces control characters and others that cannot be printed by question marks.

    Names come from other people's archives, and a terminal would obey escape sequences in them.
    """
    return "".join(character if character.isprintable() else "?" for character in text)
