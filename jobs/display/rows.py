"""Rows of the live display, one for each phase of a run or trial of a sweep."""

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
_BAR_WIDTH = 16
_LONGEST = 120
"""Characters of a text that are shown; the log above the display has errors in full."""
_PACE_S = 3600.0
"""Seconds of progress from which the time left is estimated."""


class Rows(Progress):
    """A progress bar of rich for each row: name, bar, count, time left or state, newest values.

    Args:
        now: returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(_BAR_WIDTH),
            MofNCompleteColumn(),
            _StateColumn(),
        )
        super().__init__(*columns, expand=True, get_time=now, speed_estimate_period=_PACE_S)
        self._states: dict[TaskID, str] = {}

    def add_row(self, name: str, total: int | None) -> TaskID:
        """Adds a row in state `waiting`."""
        return self.add_task(name, total=total, state="waiting", text="")

    def set_row(self, row: TaskID, completed: float, state: str, *values: str) -> None:
        """Sets the progress, state and values of a row.

        The time left is estimated only from progress between two calls in state `running`: what
        was done before, by this command or an earlier one, has another pace.
        """
        if state != RUNNING or self._states.get(row) != RUNNING:
            # rich's own tasks have floats
            self.reset(row, completed=completed)  # type: ignore[arg-type]
            self.advance(row, 0)  # the first sample of the estimate
        self._states[row] = state
        text = GAP.join(value[:_LONGEST] for value in values if value)
        self.update(row, completed=completed, state=state, text=text)


class _StateColumn(ProgressColumn):
    """The time left or the state, then the values; takes the width that is left, and wraps."""

    def __init__(self) -> None:
        super().__init__(Column(ratio=1))

    def render(self, task: Task) -> Text:
        state, left_s = task.fields["state"], task.time_remaining
        shown = f"{clock(left_s)} left" if state == RUNNING and left_s is not None else state
        return Text.assemble((shown, STYLES.get(state, WARNING)), GAP, task.fields["text"])


def one_line(text: Text) -> Text:
    """Returns the text, cut at the edge of the terminal."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def clock(seconds: float) -> str:
    """Formats a time: 4:31, 2 h 05 min, 3 d 4 h."""
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
