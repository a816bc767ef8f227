"""The plots of a report, as SVG. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import dataclasses
import io
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hemoco.intervals import Repetitions, confidence_half_width
from hemoco.results.comparison import Cell, Comparison
from hemoco.results.records import PRETRAINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Of the pretrainings, in their order; from the seventh on they begin again."""
BASELINE_COLOURS = ("#8C8C8C", "#BFBFBF", "#5E5E5E", "#A6A6A6")
_DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_INK, _LIMIT = "#333333", "#A84A00"
_MOST_POINTS = 1000
_WIDTH = 4.7  # inches: so narrow that the text can be read on a phone


class Plot(NamedTuple):
    """A drawn plot with its words."""

    title: str
    svg: bytes
    alt: str
    """What it shows, for readers who cannot see it."""
    caption: str


class Point(NamedTuple):
    """One point of a curve, with half the width of its interval; nan where there is none."""

    x: float
    y: float
    half_width: float = math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A curve."""

    label: str
    """Shown where a plot has several."""
    points: Sequence[Point]
    colour: str
    dashes: Literal["-", "--", ":", "-."] = "-"


def numbered(label: str, points: Sequence[Point], number: int, repetition: int = 0) -> Series:
    """A curve in the colour of its number; repetitions, and those beyond the colours there are, are dashed."""
    dashes = _DASHES[(repetition + number // len(COLOURS)) % len(_DASHES)]
    return Series(label=label, points=points, colour=COLOURS[number % len(COLOURS)], dashes=dashes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """Axes with curves."""

    series: Sequence[Series]
    x_label: str
    y_label: str
    limits: Sequence[tuple[float, str]] = ()
    """Dashed horizontal lines, and what they say."""
    good: tuple[float, float] | None = None
    """Range of values that is shaded as normal."""
    until: tuple[float, str] | None = None
    """From 0 to this x is shaded, and what it says."""
    shares: bool = False
    """Values are in [0, 1]: intervals end there."""
    ticks: Sequence[tuple[float, str]] = ()
    """Of the x axis; chosen where none are given."""


def line_plot(panel: Panel) -> bytes:
    """Curves in one frame."""
    figure, (axes,) = _canvas(rows=1, height=2.9)
    _draw_panel(axes, panel)
    _legend(figure, [panel])
    return _svg(figure)


def panels_plot(panels: Sequence[Panel]) -> bytes:
    """Small plots in one column, that share their curves' names."""
    figure, every = _canvas(rows=len(panels), height=0.4 + 1.35 * len(panels))
    for place, (axes, panel) in enumerate(zip(every, panels, strict=True)):
        last = place == len(panels) - 1
        _draw_panel(axes, panel if last else dataclasses.replace(panel, x_label=""))
        axes.tick_params(labelbottom=last)
    _legend(figure, panels)
    return _svg(figure)


def transfer_bars(comparison: Comparison) -> bytes:
    """A bar for each transfer and column, the mean with its 95% interval; a dot for each value where there are some."""
    height = 0.78 / max(len(comparison.columns), 1)
    figure, (axes,) = _canvas(
        rows=1, height=0.9 + (0.3 + 0.25 * len(comparison.columns)) * len(comparison.lines)
    )
    colours = column_colours(comparison)
    for place, line in enumerate(comparison.lines):
        for number, column in enumerate(comparison.columns):
            measured = comparison.values.get(Cell(line.label, column.label))
            if measured:
                middle = place + (number - (len(comparison.columns) - 1) / 2) * height
                _draw_bar(
                    axes, interval(measured), middle, height, colours[column.label], column.label
                )
    axes.set_yticks(
        range(len(comparison.lines)), [f"{line.label}\n{line.metric}" for line in comparison.lines]
    )
    axes.set_ylim(len(comparison.lines) - 0.5, -0.5)
    axes.set_xlim(0, 1.16)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(visible=False, axis="y")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(
        once.values(), once.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=10
    )
    return _svg(figure)


def column_colours(comparison: Comparison) -> dict[str, str]:
    """The colour of each column: strong for pretrainings, grey for baselines."""
    pretrainings = [column.label for column in comparison.pretrainings]
    baselines = [column.label for column in comparison.columns if column.baseline]
    strong = {label: COLOURS[place % len(COLOURS)] for place, label in enumerate(pretrainings)}
    return strong | {
        label: BASELINE_COLOURS[place % len(BASELINE_COLOURS)]
        for place, label in enumerate(baselines)
    }


class Interval(NamedTuple):
    """A mean, half of its 95% interval (nan where nothing was repeated), and the values it is of."""

    mean: float
    half_width: float
    values: tuple[float, ...]


def interval(measured: Repetitions) -> Interval:
    """Of values by pretraining and seed: over the pretrainings' means where there are several, else over the seeds."""
    means = [statistics.fmean(by_seed.values()) for by_seed in measured]
    values = means if len(means) > 1 else list(measured[0].values())
    return Interval(statistics.fmean(means), confidence_half_width(values), tuple(values))


def _draw_bar(
    axes: "Axes", found: Interval, middle: float, height: float, colour: str, label: str
) -> None:
    axes.barh(middle, found.mean, height=0.92 * height, color=colour, label=label)
    end = max(found.values)
    if len(found.values) > 1:
        axes.plot(
            found.values, [middle] * len(found.values), "o", color="black", markersize=3, alpha=0.55
        )
        low, high = (min(max(found.mean + sign * found.half_width, 0), 1) for sign in (-1, 1))
        axes.plot([low, high], [middle, middle], color="black", linewidth=1.4)
        axes.plot([low, high], [middle, middle], "|", color="black", markersize=6)
        end = max(end, high)
    axes.text(end + 0.02, middle, f"{found.mean:.3f}", va="center", fontsize=9, color=_INK)


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    for series in panel.series:
        points = _thinned(series.points)
        line = _line(series, points)
        line.set_marker("o" if len(points) <= 30 else "")
        axes.add_line(line)
        spread = [p for p in points if not math.isnan(p.half_width)]
        if spread:
            low, high = (0.0, 1.0) if panel.shares else (-math.inf, math.inf)
            below = [min(p.half_width, p.y - low) for p in spread]
            above = [min(p.half_width, high - p.y) for p in spread]
            xs, ys = [p.x for p in spread], [p.y for p in spread]
            axes.errorbar(
                xs, ys, yerr=[below, above], fmt="none", ecolor=line.get_color(), capsize=3
            )
    axes.margins(y=0.14)
    axes.autoscale_view()
    if panel.ticks:
        axes.set_xticks(*zip(*panel.ticks, strict=True))
    _draw_marks(axes, panel)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)


def _draw_marks(axes: "Axes", panel: Panel) -> None:
    for value, label in panel.limits:
        axes.axhline(value, color=_LIMIT, linewidth=1.3, linestyle="--")
        axes.annotate(
            label,
            (0.99, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=_LIMIT,
            fontsize=9,
        )
    if panel.good is not None:
        axes.axhspan(*panel.good, color=COLOURS[2], alpha=0.1, linewidth=0)
    if panel.until is not None:
        end, label = panel.until
        axes.axvspan(0, end, color="#777777", alpha=0.14, linewidth=0)
        axes.annotate(
            label,
            (end, 0.03),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color=_INK,
            xytext=(3, 0),
            textcoords="offset points",
        )


def _legend(figure: "Figure", panels: Sequence[Panel]) -> None:
    """Names the curves; that of a run shown alone needs no name."""
    series = list({one.label: one for panel in panels for one in panel.series}.values())
    if [one.label for one in series] in ([], [PRETRAINED]):
        return
    lines = [_line(one, []) for one in series]
    names = [one.label for one in series]
    figure.legend(lines, names, loc="outside upper center", ncols=3, frameon=False, fontsize=9)


def _line(series: Series, points: Sequence[Point]) -> "Line2D":
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {
        "color": series.colour,
        "linestyle": series.dashes,
        "linewidth": 1.7,
        "markersize": 4,
    }
    return Line2D([point.x for point in points], [point.y for point in points], **style)


def _canvas(rows: int, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    every = list(figure.subplots(rows, squeeze=False, sharex=True).flat)
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(colors=_INK, labelsize=9)
        axes.grid(color="#E3E3E3", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, every


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most 1000 points: means over neighbours, so that no bend is lost."""
    width = -(-len(points) // _MOST_POINTS)
    if width < 2:
        return points
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [Point(group[-1].x, statistics.fmean(point.y for point in group)) for group in groups]


def _svg(figure: "Figure") -> bytes:
    import matplotlib

    text = io.BytesIO()
    # equal data must give equal bytes
    with matplotlib.rc_context({"svg.hashsalt": "hemoco"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
