"""What verbs that work over shards show: a bar while they run, and names made safe to print."""

from collections.abc import Generator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress as Bar

from pipeline.workers.tasks import Progress

ResultT = TypeVar("ResultT")


def follow(steps: Generator[Progress, None, ResultT]) -> ResultT:
    """What the steps return in the end; until then a bar, where output is a terminal."""
    console = Console()
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards", total=None)
        while True:
            try:
                done = next(steps)
            except StopIteration as finished:
                result: ResultT = finished.value
                return result
            bar.update(task, completed=done.done, total=done.total)


def printable(text: str) -> str:
    """The text with a question mark for what a terminal would obey or could not encode."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
