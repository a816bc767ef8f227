"""The rows of the live display: one for each phase of a run or trial of a sweep, with a bar and the time left."""

from collections.abc import Callable

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

GAP = "  "
RUNNING = "running"
STYLES = {"waiting": "dim", RUNNING: "cyan", "done": "green", "failed": "red", "stopped": "red"}
WARNING = "yellow"
_BAR = 16
_LONGEST = 120
"""Letters of an error that are shown; the log above the display has it whole."""
_PACE_S = 3600.0
"""The time left follows from the progress of so many seconds."""


class Rows(Progress):
    """A progress bar of rich for each phase: name, bar, count, then time left or state, then newest values.

    Args:
        now: the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(_BAR),
            MofNCompleteColumn(),
            _StateColumn(),
        )
        super().__init__(*columns, expand=True, get_time=now, speed_estimate_period=_PACE_S)
        self._states: dict[TaskID, str] = {}

    def add(self, name: str, total: int | None) -> TaskID:
        """Adds a row that waits."""
        return self.add_task(name, total=total, state="waiting", text="")

    def set(self, row: TaskID, completed: float, state: str, *parts: str) -> None:
        """Sets how far a row is. Only progress between two calls in state `running` counts for the time left."""
        if state != RUNNING or self._states.get(row) != RUNNING:
            self.reset(row, completed=completed)  # type: ignore[arg-type]  # rich's own tasks have floats
            self.advance(row, 0)
        self._states[row] = state
        text = GAP.join(part[:_LONGEST] for part in parts if part)
        self.update(row, completed=completed, state=state, text=text)


class _StateColumn(ProgressColumn):
    """Takes the room that is left, on several lines where it is little."""

    def __init__(self) -> None:
        super().__init__(Column(ratio=1))

    def render(self, task: Task) -> Text:
        state, left_s = task.fields["state"], task.time_remaining
        shown = f"{clock(left_s)} left" if state == RUNNING and left_s is not None else state
        return Text.assemble((shown, STYLES.get(state, WARNING)), GAP, task.fields["text"])


def one_line(text: Text) -> Text:
    """The text, cut where the terminal ends."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def clock(seconds: float) -> str:
    """A time in few letters: 4:31, 2 h 05 min, 3 d 4 h."""
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
