"""What the live display shows of a run: facts that MLflow has, as lines of a terminal.

The number of lines stays the same throughout a run, so that nothing jumps and no line above is ever overwritten.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.text import Text

from hemoco.config import PretrainConfig, TransferConfig
from hemoco.results.records import PRETRAINED, done_rows
from hemoco.tracking.runs import RunFacts
from hemoco.tracking.tags import Tag
from jobs.display.facts import Facts, Phase

State = Literal["waiting", "running", "done", "failed", "stopped"]
STYLES: dict[State, str] = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "red", "stopped": "red"}
WARNING = "yellow"
_BAR = 40  # columns, at most
_REASON = 20  # columns, at least
_OUTLOOK = 21  # columns, "last record 59:59 ago"
GAP = "  "
_DATA_WAIT = 0.1  # the share above which it is worth a word
_SILENT_S = 10.0  # MLflow answers within a second; above this something is wrong
_STALE_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to do."""

    run: str
    began_s: float
    """When this process went to work at it, in seconds since 1970."""
    pretrain: PretrainConfig | None
    """None: the backbone is given."""
    steps_per_epoch: int | None
    """None: not known."""
    curve: bool
    """Transfers are measured during the pretraining too."""
    transfers: Mapping[str, TransferConfig]


class Pace:
    """How fast records of a pretraining come, as seen from here: other machines' clocks do not matter.

    Of a resumed training that repeats steps nothing is seen until it is past them: MLflow shows the highest step.
    """

    def __init__(self) -> None:
        self._before: int | None = None
        self._seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=60)

    def note(self, step: int, now_s: float) -> None:
        """Takes the step of the newest record; the first one is from before."""
        last = self._seen[-1][1] if self._seen else self._before
        if last is None:
            self._before = step
        elif step != last:
            self._seen.append((now_s, step))

    def silence_s(self, now_s: float) -> float | None:
        """Time since the newest record; None before the first."""
        return now_s - self._seen[-1][0] if self._seen else None

    def interval_s(self) -> float | None:
        """Time between two records; None where not known yet."""
        count = len(self._seen) - 1
        return (self._seen[-1][0] - self._seen[0][0]) / count if count > 0 else None

    def step_s(self) -> float | None:
        """Time per step with all that lies between the steps; None where not known yet."""
        first, last = (self._seen[0], self._seen[-1]) if self._seen else ((0.0, 0), (0.0, 0))
        return (last[0] - first[0]) / (last[1] - first[1]) if last[1] > first[1] else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A run at one moment; rich draws it."""

    plan: Plan
    facts: Facts
    pace: Pace
    now_s: float
    silence_s: float
    """Since MLflow last answered."""
    problem: str
    """Why it did not; empty where it did."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from lines_within(options.max_width, lambda width: self._lines(console, width))

    def _lines(self, console: Console, width: int) -> Iterable[Text]:
        plan = self.plan
        named = max(map(len, ("pretrain", *plan.transfers)))
        column = name_column(named, width)
        yield Text()
        if plan.pretrain is not None:
            yield named_row("pretrain", column) + self._training(plan.pretrain, console, width - column)
            yield named_row("", column) + fitting(self._details(plan.pretrain), width - column)
            if plan.curve:
                yield named_row("curve", column) + Text(_curve(self.facts.pretraining), style="dim")
        for name in plan.transfers:
            state, detail = self._transfer(name)
            shown = Text(f"{state:<9}", style=STYLES[state]) + _shortened(detail, width - column - 9)
            yield named_row(name, column) + shown
        elapsed_s = self.now_s - plan.began_s
        yield named_row("elapsed", column) + footer(plan.run, elapsed_s, self.silence_s, self.problem, width - column)

    def _training(self, config: PretrainConfig, console: Console, width: int) -> Text:
        """Bar, step and what to expect."""
        phase, per_epoch = self.facts.pretraining, self.plan.steps_per_epoch
        step = _step(phase)
        outlook = self._outlook(config)
        if per_epoch is None:
            return Text(f"step {step}{GAP}") + outlook
        total = config.epochs * per_epoch
        counted = f"{GAP}{step:>{len(str(total))}}/{total}{GAP}"
        room = min(_BAR, width - len(counted) - min(_OUTLOOK, max(10, width // 4)))
        bar = _bar(console, step, total, room) if room >= 5 else Text()
        return bar + Text(counted if bar else counted.lstrip()) + outlook

    def _outlook(self, config: PretrainConfig) -> Text:
        state, silence_s = self._pretraining_state(), self.pace.silence_s(self.now_s)
        step, per_epoch = _step(self.facts.pretraining), self.plan.steps_per_epoch
        if state != "running":
            return Text(state, style=STYLES[state])
        if silence_s is None:
            return Text("resuming" if step else "starting", style="cyan")
        if silence_s > max(_STALE_S, 5 * (self.pace.interval_s() or 0.0)):
            return Text(f"last record {clock(silence_s)} ago", style=WARNING)
        rate = self.facts.pretraining.facts.metrics.get("images_per_s", 0.0) if self.facts.pretraining else 0.0
        step_s = self.pace.step_s() or (config.global_batch_size / rate if rate > 0 else None)
        if per_epoch is None or step_s is None:
            return Text()
        return Text(f"{clock(max(0.0, (config.epochs * per_epoch - step) * step_s - silence_s))} left")

    def _details(self, config: PretrainConfig) -> list[Text]:
        """What it is at; the reason instead where it has failed."""
        phase, per_epoch = self.facts.pretraining, self.plan.steps_per_epoch
        if phase is None:
            return []
        if self._pretraining_state() in ("failed", "stopped"):
            return [Text(phase.facts.tags.get(Tag.ERROR, ""))]
        metrics, parts = phase.facts.metrics, []
        if per_epoch is not None:
            epoch = min(_step(phase) // per_epoch + 1, config.epochs)
            parts.append(Text(f"epoch {epoch:>{len(str(config.epochs))}}/{config.epochs}"))
        for name, word in (("loss", "loss"), ("knn_top1", "kNN")):
            if name in metrics:
                parts.append(Text(f"{word} {metrics[name]:.3f}"))
        if self._pretraining_state() == "running" and metrics.get("data_wait", 0.0) > _DATA_WAIT:
            parts.append(Text(f"data wait {metrics['data_wait']:.0%}", style=WARNING))
        if "images_per_s" in metrics:
            parts.append(Text(f"{metrics['images_per_s']:,.0f} images/s"))
        return parts

    def _transfer(self, name: str) -> tuple[State, str]:
        phase, config = self.facts.transfers.get(name), self.plan.transfers[name]
        if phase is None:
            return "waiting", ""
        state, units = self._state(phase), len(config.inits) * len(config.seeds)
        if state == "running" and self.plan.pretrain is not None and self._pretraining_state() != "done":
            state = "waiting"  # it is from before, left by a process that is gone
        if state == "done":
            return state, _headline(phase.facts)
        if state in ("failed", "stopped"):
            return state, phase.facts.tags.get(Tag.ERROR, "")
        done = {tag.removeprefix(Tag.DONE_PREFIX) for tag in phase.facts.tags if tag.startswith(Tag.DONE_PREFIX)}
        if state == "waiting":
            return state, f"{len(done)} of {units} measured" if done else ""
        step = max((step for key, step in phase.steps.items() if "/".join(key.split("/")[:2]) not in done), default=0)
        return state, f"{len(done)} of {units} measured" + (f"{GAP}step {step}" if step else "")

    def _pretraining_state(self) -> State:
        return "waiting" if self.facts.pretraining is None else self._state(self.facts.pretraining)

    def _state(self, phase: Phase) -> State:
        """What failed before this process began is going to be tried again."""
        status = phase.facts.status
        if status in ("FAILED", "KILLED"):
            if phase.ended_s is not None and phase.ended_s < self.plan.began_s:
                return "waiting"
            return "failed" if status == "FAILED" else "stopped"
        return "done" if status == "FINISHED" else "running"


def lines_within(max_width: int, draw: Callable[[int], Iterable[Text]]) -> Iterator[Text]:
    """The lines that are drawn for a width, none longer; an error of drawing as a line, for it must be seen.

    It must not fail whoever prints a line above the display.
    """
    width = max_width - 1  # a letter in the last column makes some terminals begin a new line
    try:
        lines = list(draw(width))
    except Exception as error:
        lines = [Text(f"the display failed, the run goes on: {type(error).__name__}: {error}", style=WARNING)]
    for line in lines:
        line.truncate(width, overflow="crop")
        yield line


def footer(name: str, elapsed_s: float, silence_s: float, problem: str, width: int) -> Text:
    """How long it goes on, and what; or that MLflow does not answer, and why."""
    elapsed = Text(clock(elapsed_s) + GAP)
    if silence_s <= _SILENT_S:
        return elapsed + Text(name, style="dim")
    silent = elapsed + Text(f"MLflow does not answer, {clock(silence_s)}", style=WARNING)
    room = width - silent.cell_len - len(GAP)
    return silent + Text(GAP) + _shortened(problem, room) if room >= _REASON else silent


def name_column(longest: int, width: int) -> int:
    """Columns for the names of what is shown, of which one has `longest` letters."""
    return min(longest, max(8, width // 3)) + len(GAP)


def clock(seconds: float) -> str:
    """A time in few letters: 4:31, 2 h 05 min, 3 d 4 h."""
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def _step(phase: Phase | None) -> int:
    return phase.steps.get("loss", 0) if phase else 0


def _headline(facts: RunFacts) -> str:
    """The mean over the seeds of the pretrained backbone, and of the others behind it."""
    values: dict[str, list[float]] = {}
    for row in done_rows(facts):
        values.setdefault(row.init, []).append(row.value)
    means = {init: sum(found) / len(found) for init, found in values.items()}
    words = [f"{facts.tags[Tag.METRIC]} {means.pop(PRETRAINED):.3f}"] if PRETRAINED in means else []
    return GAP.join([*words, *(f"{init} {mean:.3f}" for init, mean in means.items())])


def _curve(phase: Phase | None) -> str:
    """The newest point of each transfer that is measured during the pretraining."""
    if phase is None:
        return ""
    metrics = phase.facts.metrics
    points = {key.split("/")[1]: (metrics[key], phase.steps[key]) for key in metrics if key.startswith("curve/")}
    return GAP.join(f"{name} {value:.3f} after epoch {epoch}" for name, (value, epoch) in points.items())


def named_row(name: str, column: int) -> Text:
    """The beginning of a line: the name in its column."""
    return Text(f"{name[: column - len(GAP)]:<{column}}")


def _bar(console: Console, step: int, total: int, width: int) -> Text:
    shape = ProgressBar(total, min(step, total), width=width, complete_style="cyan", finished_style="green")
    drawn = console.render(shape)
    bar = Text.assemble(*((segment.text, segment.style or "") for segment in drawn if segment.text.strip("\n")))
    bar.pad_right(width - bar.cell_len)
    return bar


def fitting(parts: list[Text], width: int) -> Text:
    """The parts in a row, as many as there is room for; the first one always."""
    row = Text()
    for part in parts:
        longer = row + Text(GAP if row else "") + part
        if row and longer.cell_len > width:
            break
        row = longer
    return row


def _shortened(text: str, width: int) -> Text:
    """The text, or its beginning and dots."""
    return Text(text if len(text) <= width else text[: max(0, width - 3)] + "...")
