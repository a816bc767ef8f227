"""How long a training still takes: the end of each progress line that a worker prints."""


class TimeLeft:
    """Estimates the time left from the mean time per step since this process took its first one.

    Whatever lies between the steps (kNN evaluations, checkpoints) counts: it will come again. The first step does not,
    for it is slower than all others.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None

    def seconds(self, step: int, now_s: float) -> float | None:
        """Time left after a step that ended at `now_s`; None after the first one, when no pace is known yet."""
        if self._first is None:
            self._first = step, now_s
        first_step, first_s = self._first
        if step == first_step:
            return None
        return (now_s - first_s) / (step - first_step) * (self._total_steps - step)


def left_text(seconds: float | None) -> str:
    """The time left as a person reads it, for example "about 3 min left"; empty where it is not known."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"
