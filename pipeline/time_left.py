"""Estimate of the time that a training still takes, printed at the end of each progress line."""


class TimeLeft:
    """Estimates the time left from the mean time per step since the first step of this process.

    Time between steps (kNN evaluations, checkpoints) counts, since it will recur. The first step
    does not count: it is slower than all others.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None

    def seconds(self, step: int, now_s: float) -> float | None:
        """Returns the seconds left after a step that ended at `now_s`; None after the first."""
        if self._first is None:
            self._first = step, now_s
        first_step, first_s = self._first
        if step == first_step:
            return None
        return (now_s - first_s) / (step - first_step) * (self._total_steps - step)


def left_text(seconds: float | None) -> str:
    """Formats the time left, for example "about 3 min left"; empty if it is unknown."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"
